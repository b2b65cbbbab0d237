"""The words of the built-in base: what its printed text lines are made of."""

from __future__ import annotations


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ENGLISH = _listed(
    "the and you that was for are with his they this have from one had word but not what all were "
    "when your can said there use each which she how their will other about out many then them "
    "these some her would make like him into time has look two more write see number way could "
    "people than first water been call who oil now find long down day did get come made may part "
    "over new sound take only little work know place year live back give most very after thing "
    "our just name good sentence man think say great where help through much before line right "
    "too mean old any same tell boy follow came want show also around form three small set put "
    "end does another well large must big even such because turn here why ask went men read need "
    "land different home us move try kind hand picture again change off play spell air away "
    "animal house point page letter mother answer found study still learn should world high every "
    "near add food between own below country plant last school father keep tree never start city "
    "earth eye light thought head under story saw left few while along might close something seem "
    "next hard open example begin life always those both paper together got group often run "
    "important until children side feet car mile night walk white sea began grow took river four "
    "carry state once book hear stop without second later miss idea enough eat face watch far "
    "real almost let above girl sometimes mountain cut young talk soon list song being leave "
    "family formula image text table figure total amount date price invoice receipt street phone "
    "email order item tax sum result value column row chart title label box circle square "
    "triangle star color red green blue yellow black gray orange purple count region center top "
    "bottom middle"
)

SHAPE_WORDS = _listed(
    "a an and in on of at the is are to it left right above below beside corner middle circle "
    "square triangle star diamond cross ring bar moon heart red green blue yellow purple orange "
    "black gray brown pink picture shows shape large small from percent across down"
)

# LaTeX that the formulas of the quickstart do not use, but other people's do.
MORE_COMMANDS = _listed(
    "mathrm operatorname left right begin end array displaystyle textstyle scriptstyle prod "
    "varphi vartheta varepsilon nu kappa chi iota upsilon Xi Pi Sigma Upsilon dagger langle "
    "rangle quad qquad underline underset overset stackrel widehat widetilde lbrace rbrace "
    "mathcal mathbf mathbb cdots ldots vdots longrightarrow leftrightarrow rightarrow leftarrow "
    "star bigl bigr bf rm cal it label text mbox big Big bigg lvert rvert vert mid parallel "
    "setminus notin supset subseteq cong simeq asymp mp bullet sec csc cot tanh arctan Re Im sup "
    "inf hline"
)
