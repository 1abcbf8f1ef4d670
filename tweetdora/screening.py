"""Decide which texts a model card shows: none with an insult or personal data, by a short list and a few patterns.

The list is English and far from complete. It keeps the worst off the card; it is no content filter.
"""

import re

_INSULTS = """
    arse arsehole ass asshole bastard bitch bitches bollocks bullshit cock cocksucker crap cunt damn dick dickhead
    douche dumbass fag faggot fuck fucked fucker fuckin fucking fucks goddamn hoe hoes idiot idiots jackass loser moron
    morons motherfucker nigga niggas nigger niggers paki piss prick pussy rape retard retarded shit shitty slut sluts
    spic stfu stupid tits tranny twat wanker whore whores wtf
""".split()
_INSULT = re.compile(rf"(?<!\w)(?:{'|'.join(_INSULTS)})(?!\w)", re.IGNORECASE)
# Mentions and links that data sets put in place of the real ones are no personal data.
_PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+\.\w+"  # an address
    r"|(?<!\w)@(?!(?:user|anonymous)\b)\w{2,}"  # a mention
    r"|https?://(?!url_removed)\S+|www\.\S+"  # a link
    r"|\+?\d(?:[ ().-]?\d){6,}",  # a number of seven digits or more
    re.IGNORECASE,
)


def unsuitable(*texts: str) -> str | None:
    """Return why these texts are not shown, "insult" or "personal data"; None if they may be.

    >>> unsuitable("Thanks @user, see http://url_removed"), unsuitable("call 555-123-4567"), unsuitable("an IDIOT")
    (None, 'personal data', 'insult')
    """
    if any(_INSULT.search(text) for text in texts):
        return "insult"
    return "personal data" if any(_PERSONAL.search(text) for text in texts) else None
