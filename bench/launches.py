"""Count the operations that a training step dispatches: on a GPU, each starts at least one kernel.

A model this small is bound by that on a GPU. The count does not depend on how busy the machine is.
"""

import tempfile
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from bench.settings import Settings
from bench.sides import Side, our_side, trl_side

# Operations that start no kernel, although their schema does not say so: views, memory without contents, questions
# about dtypes, and the profiler's marks.
_FREE = {
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"),
    *("aten::new_empty", "aten::new_empty_strided", "aten::promote_types", "aten::result_type"),
    *("profiler::_record_function_enter_new", "profiler::_record_function_exit"),
}


class _Operations(TorchDispatchMode):
    """Counts operations by name, without views and what only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        name = func._schema.name
        if not (func.is_view or name in _FREE or name.startswith("aten::empty")):
            self.found[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def measure_launches(settings: Settings, precision: str) -> dict[str, dict[str, int]]:
    """Count the operations of a second step on the same batch, for both sides; the first one makes what is kept."""
    rows = settings.batches(1)[0]
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["trl"] if precision == "fp32" else ["trl", "trl_bf16"]
        sides = {kind: trl_side(settings, precision, rows, folder, kind) for kind in kinds}
        sides["ours"] = our_side(settings, precision)
        return {name: count_operations(side, rows) for name, side in sides.items()}


def count_operations(side: Side, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the operations of a step that are no views, by name; the most frequent first."""
    side.step(rows)
    with _Operations() as operations:
        side.step(rows)
    return dict(operations.found.most_common())
