r"""The rewards of Observe-R1 (arXiv 2505.12432): accuracy, format and bonus, and the dynamic weight.

The rewards come first. Below them stands the checker behind `accuracy_reward`: a small language of
answers with a table of spellings, a parser and a comparison. What `answers_match` reads:

    choice      B   (b)   **B**   <b>B</b>   B. 12 cm   B, because ...   The answer is (B).   选B
    options     AC   A, C   (C) and (A)     in any order
    number      1,345   1{,}000   .5   1 1/2   1\frac12   1.2e3   3 x 10^4   3 million   two thirds
    quantity    12 cm^2   12 cm2   60km/h   50%   60^\circ   $5   2 hours 40 minutes   3:15 PM   5厘米
    expression  + - * / ^ ( ) | |   \frac ab   \sqrt[3]{8}   2sqrt(3)   4\pi(5)^2   \sin^2 x   x_1
    equation    x = 5   180 - 45 = 135   a + b = 3 + 4 = 7   \sqrt7 \approx 2.646   y = 2x + 1
    inequality  x \geq 5   5 <= x   1 < x < 3   x \in [1,3)   x < 1 or x > 3
    list        (2, 3)   [1, 2)   {2, 1}   3 and -3   1 \pm \sqrt2   (1,2) \cup (3,4)   \begin{pmatrix}
    ratio       4:6 is 2:3 and 2/3, but 3:1 is not 3; times such as 12:00 are not ratios
    range       16-20   16 to 20     never a subtraction
    statement   The area is 12 cm.   There are 5 red balls.   Perimeter: 12     if it states one value
    text        everything else; case, articles and outer punctuation do not count

Values are exact fractions where they can be. Expressions with letters are equal if they agree at
fixed points. One of two answers may leave out the unit; two units must convert exactly: 1 m is
100 cm. If the gold is a decimal, every value that rounds to it is right: \pi matches 3.14, but 3.1
does not. If the gold is exact, a decimal is right if it is rounded correctly and has at least three
digits: 1.41 matches \sqrt2, but 1.4 does not. A gold such as "B. 12 cm" is matched by its letter,
by its text, or by both.

Whatever is unclear scores 0. To miss a right answer only slows the learning; to reward a wrong one
teaches the model to give wrong answers. Some notations are not read and equal only their own text:
factorials, sums over an index, complex numbers such as i^2, relations inside brackets, and
repeating decimals.
"""

import functools
import itertools
import math
import operator
import random
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction


def format_reward(response: str, observe: bool = True) -> float:
    """The paper's format reward: 0.5 if the blocks are those that the prompt asks for, else 0.0.

    The prompt asks for observe, think and answer. They stand in this order with only white space
    between them, or observe stands inside think, which must have text of its own. Each tag occurs
    once, no block is blank, and any text may stand before and after the whole. observe=False asks
    for think and answer alone. The time is linear in the length of the response.

    >>> format_reward("<observe>a</observe> <think>b</think> <answer>c</answer>")
    0.5
    """
    names = ("observe", "think", "answer") if observe else ("think", "answer")
    pieces = re.split(f"(</?(?:{'|'.join(names)})>)", response)
    pieces[-1] = ""  # what follows the last tag does not count
    shape = ""  # the tags, and an x for each text between them
    for tag, text in zip(pieces[1::2], pieces[2::2]):
        shape += tag + "x" * bool(text.strip())
    in_a_row = "".join(f"<{name}>x</{name}>" for name in names)
    shapes = (
        in_a_row,
        "<think>x<observe>x</observe></think><answer>x</answer>",
        "<think><observe>x</observe>x</think><answer>x</answer>",
        "<think>x<observe>x</observe>x</think><answer>x</answer>",
    )
    return 0.5 if shape in shapes else 0.0


def bonus_rewards(
    correct: Sequence[bool], lengths: Sequence[int], min_length: int = 100, bonus: float = 0.2
) -> list[float]:
    """The bonus to the shortest correct response of a group, if it is longer than min_length.

    The floor keeps "be short" from becoming "do not reason": if the shortest correct response does
    not exceed it, nobody gets the bonus, not even a longer response. Ties go to the first. A length
    counts the tokens of a response with its stop token. ValueError unless both are those of one group.

    >>> bonus_rewards([True, True, False], [300, 200, 50])
    [0.0, 0.2, 0.0]
    """
    if not correct:
        raise ValueError("a group needs at least one response")
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} responses, but {len(lengths)} lengths")
    if min(lengths) < 0:
        raise ValueError(f"the length of a response is negative: {min(lengths)}")
    rewards = [0.0] * len(correct)
    right = [i for i, is_correct in enumerate(correct) if is_correct]
    if right:
        shortest = min(right, key=lengths.__getitem__)
        if lengths[shortest] > min_length:
            rewards[shortest] = bonus
    return rewards


def dynamic_weight(correct: Sequence[bool], sigma: float = 1.8) -> float:
    """The paper's weight of a group: 4 sigma p (1 - p), where p is the share of correct responses.

    A group that is half right weighs sigma; one that is all right or all wrong weighs 0. ValueError
    for an empty group.

    >>> [dynamic_weight([True] * n + [False] * (8 - n)) for n in (0, 1, 4, 8)]
    [0.0, 0.7875, 1.8, 0.0]
    """
    if not correct:
        raise ValueError("a group needs at least one response")
    share_solved = sum(map(bool, correct)) / len(correct)
    return 4 * sigma * share_solved * (1 - share_solved)


def accuracy_reward(response: str, gold: str) -> float:
    """The paper's accuracy: 1.0 if the final answer of the response matches the gold, else 0.0.

    >>> accuracy_reward("<think>3 + 4</think><answer>7</answer>", "7"), accuracy_reward("7", "7")
    (1.0, 0.0)
    """
    answer = extract_answer(response)
    return float(answer is not None and answers_match(answer, gold))


def extract_answer(response: str) -> str | None:
    r"""The last complete <answer> block, else the last \boxed{} outside <think>, else None.

    An answer that was cut is no answer, and a box inside <think> is only a guess, whether or not
    the thought was closed.

    >>> extract_answer("<answer>1</answer> <answer>2</answer>"), extract_answer(r"so \boxed{12}")
    ('2', '12')
    >>> extract_answer(r"<think>perhaps \boxed{12}") is extract_answer("<answer>1") is None
    True
    """
    complete = re.findall(r"(?s)<answer>((?:(?!</?answer>).)*)</answer>", response)
    if complete:
        return complete[-1]
    # A </think> that is left over closes a thought that another trainer's prompt has opened.
    outside = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", " ", response).rpartition("</think>")[2]
    _, boxed, rest = outside.rpartition(r"\boxed{")
    depth = 1
    for end, character in enumerate(rest if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
    return None


# ------------------------------------------------------------------- the checker: tables of tokens

MAX_LENGTH = 400  # characters; a longer answer matches only its own text
MAX_PARTS = 100  # numbers, letters and brackets of an answer; bounds time and recursion
MAX_BITS = 1000  # of a numerator or a denominator; a float can hold as many
POINTS = 8  # at so many points expressions with letters are compared
_cached = functools.lru_cache(maxsize=4096)


def _rows(text):
    """The words of each line of a table."""
    return [line.split() for line in text.strip().splitlines()]


def _rules(text):
    """[(pattern, replacement)] of lines "pattern → replacement", in which ␣ is a space."""
    lines = re.findall("(?m)^    (.+) → ?(.*)$", text.replace("␣", " "))
    return [(re.compile(pattern), replacement) for pattern, replacement in lines]


def _rewrite(text, rules):
    """The text after all rules, one after another. No rule changes a plain number."""
    if text.isdecimal():
        return text
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


_SPELLINGS = {  # the token comes first, its other spellings follow
    spelling: token
    for token, *spellings in _rows(r"""
    *  \cdot \times \ast × · ⋅ ∙ ∗
    /  \div ÷ ⁄ ∕ per 每
    -  − – — ‐ ‑
    ±  \pm
    ∓  \mp
    ^  **
    =  \equiv == ≈ \approx \simeq \sim ≅ \cong ≃
    ≤  \leq \le \leqslant <= =< ⩽
    ≥  \geq \ge \geqslant >= => ⩾
    ≠  \neq \ne !=
    <  \lt
    >  \gt
    ∈  \in
    ∪  \cup
    ∧  and \wedge \land 和 且
    ∨  or \vee \lor 或
    …  to 到
    :  & ∶
    ;  \\
    |  \lvert \rvert \vert \mid ∣
    ∞  \infty infinity infty inf oo
    ∅  \emptyset \varnothing Ø
    %  \% percent pct percentage
    °  \degree deg degree degrees º ∘ ˚
    $  dollar dollars USD
    ∠  \angle
    ⟦  \begin{pmatrix} \begin{bmatrix} \begin{matrix} \begin{array}
    ⟧  \end{pmatrix} \end{bmatrix} \end{matrix} \end{array}
    frac  \frac \dfrac \tfrac \cfrac
    root \root
    power \power
    sin \sin
    cos \cos
    tan \tan
    exp \exp
    sinh \sinh
    cosh \cosh
    tanh \tanh
    asin  \arcsin arcsin
    acos  \arccos arccos
    atan  \arctan arctan
    log   \ln ln
    log10 \log \lg log lg
    π  \pi pi
    α  \alpha alpha
    β  \beta beta
    γ  \gamma gamma
    δ  \delta delta
    Δ  \Delta Delta
    ε  \epsilon \varepsilon epsilon
    θ  \theta theta \vartheta
    λ  \lambda lambda
    μ  \mu mu µ
    ρ  \rho rho
    σ  \sigma sigma
    τ  \tau tau
    φ  \phi \varphi phi
    ω  \omega omega
    Ω  \Omega Omega ohm ohms Ω
    drop ~ \left \right \big \Big \bigg \Bigg \bigl \bigr \displaystyle \textstyle \quad \qquad
    drop \! \, \; \: \limits \overrightarrow \vec \widehat \hat \boxed \fbox \large \Large \small \text \mathrm
    0  zero
    1  one 一
    2  two 二 两
    3  three 三
    4  four 四
    5  five 五
    6  six 六
    7  seven 七
    8  eight 八
    9  nine 九
    10 ten 十
    11 eleven
    12 twelve dozen
    """)
    for spelling in spellings
}
_CONSTANTS = {"π": math.pi, "e": math.e, "∞": math.inf} | {
    spelling: Fraction(value)
    for value, *spellings in _rows("""
    1/2 half halves
    1/3 third thirds
    1/4 quarter quarters
    100 hundred
    1000 thousand
    1000000 million
    1000000000 billion
    """)
    for spelling in spellings
}
_UNITS = {  # {spelling: (factor, base)}: 1 cm is 1/100 of an m; base 1 is a mere number
    spelling + ending: (Fraction(factor), spelling if base == "each" else base)
    for ending in ("es", "s", "")
    for factor, base, *spellings in _rows("""
    1/100 1 %
    0.017453292519943295 1 °
    1 1 rad radian
    1 $ $
    1/100 $ cent cents ¢
    1 € € euro EUR
    1 £ £ GBP
    1 ¥ ¥ yuan yen RMB
    1 ₹ ₹ rupee
    1 m m meter metre
    1/10 m dm
    1/100 m cm centimeter centimetre
    1/1000 m mm millimeter millimetre
    1/1000000 m μm micrometer
    1/1000000000 m nm nanometer
    1000 m km kilometer kilometre
    1 in in inch inche
    12 in ft foot feet
    36 in yd yard
    63360 in mi mile
    1 g g gram
    1/1000 g mg milligram
    1000 g kg kilogram
    1 ton ton tonne
    1 oz oz ounce
    16 oz lb pound
    1 L L l liter litre
    1/1000 L mL ml milliliter millilitre
    1 gallon gallon gal
    1/4 gallon quart
    1/8 gallon pint
    1/16 gallon cup
    1 s s sec second
    1/1000 s ms millisecond
    60 s min minute
    3600 s h hr hour
    86400 s day
    604800 s week
    1 month month
    12 month year yr
    1 N N newton
    1000 N kN
    1 J J joule
    1000 J kJ
    1 W W watt
    1000 W kW kilowatt
    1 kWh kWh
    1 V V volt
    1 A A amp ampere
    1/1000 A mA
    1 Ω Ω
    1000 Ω kΩ
    1 C C coulomb
    1 F F farad
    1 K K kelvin
    1 Pa Pa pascal
    1000 Pa kPa
    1 Hz Hz hertz
    1000 Hz kHz
    1 mol mol mole
    1 cal cal calorie
    1 degC celsius degC
    1 degF fahrenheit degF
    1 mph mph
    1 each unit piece item time way person people student child children boy girl man woman men women
    1 each apple orange banana egg fruit ball book page pencil pen card coin marble dot point vote car
    1 each vehicle bike bus train animal dog cat bird fish cow horse rabbit chicken sheep tree flower
    1 each leaf leave plant seed house room floor window door table chair box bag bottle glass candy
    1 each candie cookie cake sticker stamp toy block cube square triangle circle rectangle polygon
    1 each side edge vertex vertice face angle line segment diagonal object thing shape country state
    1 each city team game goal match win round step digit number integer value solution term factor
    1 each pair set group row column layer tile brick gift ticket worker employee teacher player
    1 each member adult kid customer family friend shirt shoe dress hat ring bead key button letter
    1 each word question problem test class school course lesson subject revolution turn lap trip
    1 each slice pizza sandwich pie muffin donut jar pack package bunch photo picture story option
    1 each choice outcome arrangement combination permutation possibility region cell acre barrel
    """)
    for spelling in spellings
}
_FUNCTIONS = {
    name: getattr(math, name)
    for name in _rows("sin cos tan asin acos atan sinh cosh tanh log log10 exp")[0]
}
_RELATIONS = "=≠<>≤≥∈"
_LISTS = ",;∧∨…:⏲∪([{⟦"
_LEVELS = {  # how tightly an operator binds; a product without a sign stands at 6.5
    sign: level
    for level, signs in enumerate(
        _rows(r"""
    ) ] } \} ⟧ {
    ;
    , ∧ ∨
    = ≠ < > ≤ ≥ ∈
    : ⏲ … ∪
    + -
    * /
    unused
    ^
    """)
    )
    for sign in signs
}
_CLOSING = dict(  # the brackets that may close what one opens
    _rows(r"""
    (  )]
    [  )]
    {  \}
    \{ \}
    ⟦  ⟧
    |  |
    """)
)
_WORDS = {*_SPELLINGS, *_UNITS}
_KNOWN = {*_WORDS, *_SPELLINGS.values(), *_CONSTANTS, *_FUNCTIONS}  # not products of letters


_RULES = _rules(  # spellings that concern more than one token
    r"""
    、 → ,
    (?<=[A-H]) ?[&;与和] ?(?=[A-H]\b) → ,
    ^([A-H]) ([A-H])$ → \1,\2
    (?<=\([A-Ha-h]\)) ?(?=\([A-H]\)) → ,
    ([0-9]+|[一二两三四五六七八九十])分之([0-9]+|[一二三四五六七八九十]) → \2/\1
    (?<=[0-9]) ?比 ?(?=[0-9]) → :
    百分之 ?([0-9.]+) → \1%
    根号 → √
    (?<=[0-9一二两三四五六七八九十])(?:个|只|条|名|人|本|支|颗|棵|辆|块|张|件|种|次|位|头)(?!半|多|月|小时)[\u4e00-\u9fff]*$ → ␣units
    (?<=[米升克])[长宽高深]$|^[长宽高深](?=[0-9]) →
    毫米 → ␣mm␣
    厘米|公分 → ␣cm␣
    分米 → ␣dm␣
    千米|公里 → ␣km␣
    米 → ␣m␣
    毫克 → ␣mg␣
    千克|公斤 → ␣kg␣
    克 → ␣g␣
    毫升 → ␣mL␣
    升 → ␣L␣
    个?小时|(?<=/)时 → ␣hours␣
    分钟 → ␣minutes␣
    秒 → ␣seconds␣
    天 → ␣days␣
    个月 → ␣months␣
    岁 → ␣years␣
    元 → ␣yuan␣
    摄氏度 → ␣degC␣
    度 → °
    平方 * → ␣square␣
    立方 * → ␣cubic␣
    (?<=[0-9]) ?[xX] ?(?=[0-9]) → *
    (?<=[0-9])(?:\{,\}|,\\!|\\,|\\!) *(?=[0-9][0-9][0-9]) →
    (?<=[0-9]) ?A\.?M\b\.?|(?<=[0-9]) a\.?m\b\.?|(?<=:[0-9][0-9])am\b → :AM
    (?<=[0-9]) ?P\.?M\b\.?|(?<=[0-9]) p\.?m\b\.?|(?<=:[0-9][0-9])pm\b → :PM
    (?<=[0-9])h ?(?=[0-9]) → ␣hours␣
    \bUS\$ → $
    \b([A-Za-z])\(([0-9]+)\) ?= → \1_\2=
    (?<![0-9:.])([01]?[0-9]|2[0-4]):([0-5][0-9])(?![0-9.:]) → \1⏲\2
    ′ → '
    \^ ?\{? ?(?:\\circ|°|∘|\\degree|o\b) ?\}? → °
    (?:°|\bdegrees?) *(?=[CF]\b|[Cc]els|[Ff]ahr)([CcFf])[a-z]* → ␣deg\1
    \bsq(?:uare)?\.? (?=[a-z])(?!root)([a-z]+) → \1^2
    \bcu(?:bic)?\.? ([a-z]+) → \1^3
    ␣squared\b → ^2
    ␣cubed\b → ^3
    (?<![A-Za-z\\_])([cdkm]?m|ft|in|yd|mi|s|units?)([23])(?![\w.^]) → \1^\2
    ([$€£¥₹]) ?([0-9.,]+) → \2 \1
    \\\\(?=(?:frac|[dtc]frac|left|right|pi|sqrt|leq?|geq?|text|cup|infty)\b) → \\
    (?:\\log|log) ?_ ?\{? ?([0-9a-z]+) ?\}? → \\frac{1}{\\ln{\1}}\\ln␣
    \\?\b(sin|cos|tan) ?\^ ?\{? ?-1 ?\}? → ␣a\1␣
    \\?\bcot ?\^ ?\{? ?([0-9]) ?\}? → ␣power{-\1}tan␣
    \\?\bsec ?\^ ?\{? ?([0-9]) ?\}? → ␣power{-\1}cos␣
    \\?\bcsc ?\^ ?\{? ?([0-9]) ?\}? → ␣power{-\1}sin␣
    \\?\bcot\b → ␣power{-1}tan␣
    \\sec\b|\bsec(?=\() → ␣power{-1}cos␣
    \\?\bcsc\b → ␣power{-1}sin␣
    \\?\b(sin|cos|tan|log|ln) ?\^ ?\{? ?([0-9a-z]) ?\}? → ␣power{\2}\1␣
    \b(sin|cos|tan|log|ln)(?=[a-z]\b) → \1␣
    \\?(?<![A-Za-z])sqrt ?\[ ?([0-9a-z]+) ?\] → ␣root{\1}
    \b(?:the )?cube root of |(?<![A-Za-z])cbrt|∛ → ␣root{3}
    \\sqrt(?![a-z])|(?<![A-Za-z][A-Za-z])(?<!\\)(?i:sqrt)|√|\\surd|\b(?:the )?square root of |(?:^| )root (?=[0-9]) → ␣root{2}
    \\[dtc]?frac ?([0-9]) ?([0-9]) → \\frac{\1}{\2}
    \\[dtc]?frac ?([0-9])(?=[{\\]) → \\frac{\1}
    (?<![\w.^])([0-9]+) ?\\[dtc]?frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\} → (\1+\2/\3)
    (?<![\w.^])([0-9]+) ([0-9]+) ?[/⁄] ?([0-9]+)(?![\w.^]) → (\1+\2/\3)
    _ ?\{ ?\\?([A-Za-z0-9]+) ?\} → _\1
    \\overline(?= ?\{? ?[A-Z]) →
    \\\{ ?\\\} → ∅
    (?:\\angle|∠) ? → ∠
    (?:\\triangle|△) ? → △
    (?<=[)\]}]) *U *(?=[(\[{\\]) → ∪
    \\\\ ?(?=\\end)|(?<=\\begin\{array\}) ?\{[a-z| ]*\} →
    (?<=[a-z][a-z])-(?=[a-z][a-z]) → ␣
    \b(years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|feet|ft|dollars?) and (?=[0-9]) → \1␣
    \bmph\b → mi/h
    \} ?\\f?boxed → },
    [,;] ?(and|or)\b → ␣\1
    (?:\\cup|∪) ?(?=[a-z] ?(?:[<>≤≥]|\\[gl])) → ␣or␣
"""
)
_TOKEN = re.compile(
    r"[0-9]+_[0-9]+|[0-9]+\.?[0-9]*[eE][-+]?[0-9]+|[0-9]+\.?[0-9]*|\.[0-9]+"
    r"|\\(?:begin|end)\{[a-z]+\}|[∠△]\w+"
    r"|\\?[A-Za-z]+_[A-Za-z0-9]+'*|\\?[A-Za-z]+'*|\\\W|<=|>=|==|!=|\*\*|\S"
)
_TOKEN_RULES = _rules(  # 2 hours + 40 minutes; 16 … 20; a + b, a - b for a ± b; no unary plus
    r"""
    ([0-9.]+ ([a-z][a-z]+|\$)) (?=[0-9.]+ (?!\2 )[a-z][a-z]) → \1 +␣
    (^|, )([0-9.]+(?: [%°$€]| [a-z][a-z]+)?) - (?=[0-9.]+(?: [%°$€]| [a-z][a-z]+)?(?:$| ,)) → \1\2 …␣
    (?:^(?!\\\{)|(?<=, )|(?<=\\\{ ))([^±,]*)±([^±,]*?)(?= ,| \\\}|$) → \1+\2 , \1-\2
    (^|[(\[{,;=<>≤≥^] )\+␣ → \1
"""
)


def _tokens(text):
    """The tokens of an answer in one spelling; an unknown short word is a product of letters."""
    tokens = []
    for raw in _TOKEN.findall(_rewrite(text, _RULES)):
        stem, line, index = raw.partition("_")
        if len(stem) > 1 and stem not in _WORDS and stem.lower() in _WORDS:
            stem = stem.lower()  # Three, Meters
        token = _SPELLINGS.get(stem, stem)
        if raw == token and raw not in _KNOWN and re.fullmatch("[a-z]{2,3}", raw):
            tokens += raw
        elif token != "drop":
            tokens.append(token + line + index)
    return _rewrite(" ".join(tokens), _TOKEN_RULES).split()


_NAME = re.compile(r"[∅∠△]|(?:[^\W\d_\u3000-\uffff]|[A-Z]+)(?:_|'|$)")


class _Parser(list):
    r"""A precedence parser: an answer becomes a tree (head, part, ...), or ValueError.

    answer   = relation {("," | ";" | "∧" | "∨") relation}
    relation = ratio {sign ratio}         = ≠ < > ≤ ≥ ∈; a chain is one node: ("<≤", 1, x, 3)
    ratio    = sum {(":" | "…" | "∪") sum}                       16 … 20 is a range
    sum      = product {("+" | "-") product}
    product  = power {["*" | "/"] power}  without a sign no number may follow: 3 4 is nothing
    power    = atom ["^" power]
    atom     = number | letter | unit | "-" product | "(" answer ")" | "|" sum "|"
             | (frac | root | power) atom atom | function (atom in brackets | power {power})

    A unit stands behind a number or another unit. Heads of trees are the operators, the brackets
    of lists such as "[)", and number, letter, unit.
    """

    def __init__(self, tokens):
        super().__init__(["", *reversed(tokens)])  # a stack: the next token is the last
        self.open = [""]
        self.parts = 0

    def level(self):
        """How tightly the next token binds to what stands before it."""
        token = self[-1]
        if token[:1] in "0123456789." or token == "|" == self.open[-1]:
            return 0  # a number, the end (an empty token) or a closing bar
        if self.open[1:] and token in _RELATIONS:
            return 0  # no relation stands in brackets
        if token in _FUNCTIONS:
            return 6  # \sin b \cos a is a product of two
        return _LEVELS.get(token, 6.5)

    def parse(self, limit=0):
        """The longest tree whose operators bind tighter than the limit."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise ValueError("too long")
        tree = self.prefix(limit)
        while self.level() > limit:
            tree = self.infix(tree, self.level())
        return tree

    def infix(self, left, level):
        operator = self.pop() if self[-1] in _LEVELS else "*"
        if level >= 6 and self.is_unit(left):
            self[-1] = "#" + self[-1]
        right = self.parse(7 if operator == "^" else level + 0.5)
        if level == 3 and left[0][0] in _RELATIONS:
            return left[0] + operator, *left[1:], right
        if level < 5 and (left[0] == operator or left[0] == "," and level == 2):
            return operator, *left[1:], right
        return operator, left, right

    def is_unit(self, left):
        """Whether the next token is a unit: 5 V, but neither 5 V x nor 2\\pi h."""
        token, following = self[-1], self[-2:][0]
        if token not in _UNITS or token.isalpha() and _leaves(left, "letter"):
            return False
        if len(token) > 1 or not token.isalpha() or _leaves(left, "unit"):
            return True
        return following in "/,;)" and left[0] == "number" or token == "m" and following in "^/,;)"

    def prefix(self, limit):
        token = self.pop()
        if token == "-":
            return "negative", self.parse(max(limit, 5))
        if token[:1] in "0123456789.":
            return ("letter", token) if "_" in token else _number(token)
        if token[:1] == "#":
            return "unit", token[1:]
        if token in _CLOSING:
            return self.group(token)
        if token in ("frac", "root", "power"):
            return token, self.parse(8), self.parse(8)
        if token in _FUNCTIONS:
            return token, self.parse(8 if self[-1] in _CLOSING else 6)
        if token in _CONSTANTS:
            return "number", _CONSTANTS[token], 0
        if _NAME.match(token):
            return "letter", token
        raise ValueError(f"{token} begins nothing")

    def group(self, opening):
        """A tuple, an interval or a set; a single expression in brackets is that expression."""
        self.open.append(opening)
        tree = self.parse(3 if opening == "|" else 0)
        self.open.pop()
        closing = self.pop()[-1:] or "the end"
        if closing not in _CLOSING[opening]:
            raise ValueError("brackets that do not fit")
        kind = opening[-1] + closing
        if _LEVELS.get(tree[0], 9) < 3:
            return kind, *tree[1:]
        return (kind, tree) if opening in ("⟦", r"\{", "|") else tree


# ------------------------------------------------------------------------------------ the values


def _number(text):
    """("number", value, decimals) of 12, .5 or 1.2e3."""
    digits, _, exponent = text.lower().partition("e")
    if len(text) > 200 or abs(int(exponent or 0)) > 99:
        raise ValueError("too large")
    return "number", Fraction(text), 0 if exponent else len(digits.partition(".")[2])


def _parts(tree):
    """The trees in a tree."""
    return [part for part in tree[1:] if isinstance(part, tuple)]


@_cached
def _leaves(tree, *kinds):
    """What the leaves of some kinds say: letters or units."""
    if tree[0] in kinds:
        return {tree[1]}
    return set().union(*[_leaves(part, *kinds) for part in _parts(tree)])


@_cached
def _letter(name, point):
    """The value of a letter at a point, drawn for each letter alone; some are negative."""
    draw = random.Random(f"{name} {point}")
    return Fraction(draw.randint(100 if point < POINTS // 2 else -3000, 3000), 997)


def _bits(value):
    """The size of a number, to be asked before it grows without bound."""
    if not isinstance(value, Fraction):
        return 0 if math.isfinite(value) else math.inf  # TypeError if it is complex
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _power(base, exponent):
    if _bits(base) * abs(exponent) > MAX_BITS:
        raise ValueError("too large")
    return base**exponent


def _root(degree, radicand):
    if radicand < 0 and degree % 2 == 1:
        return -_root(degree, -radicand)
    if degree not in range(1, 10):
        raise ValueError("no such root")
    size = radicand ** (1 / degree)
    near = Fraction(size).limit_denominator(10**6)
    return near if near**degree == radicand else size


_OPERATORS = {
    **_FUNCTIONS,
    **{
        sign: getattr(operator, name)
        for name, *signs in _rows("""
        add +
        sub -
        mul *
        truediv / : frac
        neg negative
        abs ||
        """)
        for sign in signs
    },
    "^": _power,
    "power": lambda exponent, base: _power(base, exponent),
    "root": _root,
}


def _value(tree, point, with_units):
    """The value of an expression at a point: a Fraction if it can be, else a float."""
    head, *parts = tree
    if head == "number":
        return parts[0]
    if head == "letter":
        return _letter(parts[0], point)
    if head == "unit":
        factor, base = _UNITS[parts[0]] if with_units else (Fraction(1), "1")
        return factor if base == "1" else factor * _letter(base, point)
    compute = _OPERATORS[head]
    result = compute(*[_value(part, point, with_units) for part in parts])
    if _bits(result) > MAX_BITS and head != "negative":  # which is no larger
        raise ValueError("too large")
    return result


def _at(tree, point=0, with_units=True):
    """The value at a point, None if there is none."""
    try:
        return _value(tree, point, with_units)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None


def _agree(a, b, with_units=True):
    """The same value, or the same values at several points."""
    points = range(POINTS if _leaves(("pair", a, b), "letter", "unit") else 1)
    shared = 0
    for point in points:
        x, y = _at(a, point, with_units), _at(b, point, with_units)
        if None not in (x, y):
            if not _same_number(x, y, _decimal(a), _decimal(b)):
                return False
            shared += 1
    return shared > len(points) // 3


def _decimal(tree):
    """(value, decimals) of the decimal number in 3.14, -3.14 or 3.14 cm, else None."""
    if tree[0] == "negative" or tree[0] in "*/" and _leaves(tree[2], "unit"):
        return _decimal(tree[1])
    return tree[1:] if tree[0] == "number" and tree[2] else None


def _same_number(x, y, decimal_x, decimal_y):
    """Equal, or x rounds to the decimals of the gold y; if y is exact, y to three digits of x."""
    exact = isinstance(x, Fraction) and isinstance(y, Fraction)
    if x == y or not exact and math.isclose(x, y, abs_tol=0 if x and y else 1e-12):
        return True
    if not decimal_y and decimal_x and decimal_x[0] * 10 ** decimal_x[1] >= 100:
        x, y, decimal_y = y, x, decimal_x
    if not decimal_y or not y or not math.isfinite(x):
        return False
    value, decimals = decimal_y
    half = Fraction(10) ** -decimals / 2
    return value - half <= x / y * value < value + half


# -------------------------------------------------------------------------------- the comparison


def _same(a, b):
    """Whether two trees, of an answer and a gold, are the same by the table of this module."""
    if a == b:
        return True
    if a[0][0] in _RELATIONS or b[0][0] in _RELATIONS:
        return _same_relation(a, b)
    if ":" in (a[0], b[0]):
        return _same_ratio(a, b)
    # The name AC may be the options A and C. BA is not: its order may count.
    if b[0] in ",∧{}" and a[0] == "letter":
        a, b = b, a
    if a[0] in ",∧{}" and b[0] == "letter" and re.fullmatch("A?B?C?D?E?F?G?H?", b[1]):
        b = (",", *[("letter", option) for option in b[1]])
    if b[0][0] in _LISTS:
        return _same_list(a, b)
    if _agree(a, b):
        return True
    if "+" in (a[0], b[0]) or _leaves(a, "unit") and _leaves(b, "unit"):
        return False
    # One side may leave out the unit, but nothing else.
    return not _leaves(("pair", a, b), "letter") and _agree(a, b, with_units=False)


def _same_ratio(a, b):
    """Whether the parts have the same shares. A fraction is a ratio of two; a number is none."""
    if len(a) != len(b) or not {a[0], b[0]} <= {*":⏲/", "frac"}:
        return False
    return all(_agree(("/", x, a[1]), ("/", y, b[1])) for x, y in zip(a[1:], b[1:]))


def _same_list(a, b):
    """Sets and bare lists in any order; a bare list may stand for a tuple or a set."""
    kinds = {a[0], b[0]}
    brackets = kinds - {*",;∧∨"}
    if len(brackets) > 1 or len(kinds) > 1 and not brackets <= {"()", "{}", "∪"}:
        return False
    if "∧" in kinds and ("∪" in kinds or "∨" in kinds and b[1][0][0] in "<≤≠≥>"):
        return False
    names_a, values_a = zip(*map(_solved, a[1:]))
    names_b, values_b = zip(*map(_solved, b[1:]))
    named = any(names_a) and any(names_b)
    items_a, items_b = (a[1:], b[1:]) if named else (values_a, values_b)
    several = len({*names_a, *names_b} - {None}) > 1  # then 3, 4 is x = 3, y = 4 in this order
    if several and "∨" in kinds:
        return False
    if brackets <= {"{}", "∪"} and (named or not several):
        items_a, items_b = sorted(items_a, key=_sort_key), sorted(items_b, key=_sort_key)
    return len(items_a) == len(items_b) and all(map(_same, items_a, items_b))


def _sort_key(tree):
    """The values in a tree, so that equal items of two sets stand in the same places."""
    value = _at(tree)
    if value is not None:
        return [float(value)]
    return [number for part in _parts(tree) for number in _sort_key(part)]


def _is_name(tree):
    r"""Whether it may stand for a value: x, AB, f(x), |AB|, \angle A, (x, y), A:B, no number."""
    if tree[0] in {*"*/:", "frac", "||", "()"}:
        return all(map(_is_name, tree[1:]))
    return tree[0] == "letter"


_MIRROR = str.maketrans("<>≤≥", "><≥≤")
_INTERVALS = dict(
    _rows("""
    << ()
    <≤ (]
    ≤< [)
    ≤≤ []
    """)
)
_INFINITE = ("number", math.inf, 0)


def _solved(tree, lenient=False):
    """(name, value) of x = 5, 5 = x, x > 5, 180 - 45 = 135; (None, tree) of anything else.

    All sides without letters must have one value. An answer is read leniently: it may also name
    its value by a term, as in A + B = 90 or in a^2 + b^2 = 9 + 16 = 25, but not in 2x = 10.
    """
    signs, *sides = tree
    if signs[0] not in _RELATIONS:
        return None, tree
    if signs[0] in ">≥":
        signs, sides = signs[::-1].translate(_MIRROR), sides[::-1]
    relation = signs, *sides
    if not signs.strip("="):
        sides.sort(key=_is_name, reverse=True)
        values = [side for side in sides if not _leaves(side, "letter")] or sides[1:]
        names = [side for side in sides if side not in values]
        clear = all(map(_is_name, names))
        if lenient:
            clear = values[1:] or not all(_leaves(name, "number") for name in names)
        if clear and all(_same(values[0], value) for value in values):
            return (names or [None])[0], values[0]
    elif _is_name(sides[0]):
        if signs == "∈":
            return sides
        signs, sides = "<" + signs, [("negative", _INFINITE), *sides]
    elif len(sides) == 2:
        signs, sides = signs + "<", [*sides, _INFINITE]
    if signs in _INTERVALS and _is_name(sides[1]) and sides[1][0] != "||":
        return sides[1], (_INTERVALS[signs], sides[0], sides[2])
    return None, relation


def _same_relation(a, b):
    """Equations and inequalities; one that is solved may stand for the value."""
    (name_a, value_a), (name_b, value_b) = _solved(a, lenient=True), _solved(b)
    solved = not {value_a[0][0], value_b[0][0]} & {*_RELATIONS}
    if solved and (name_a == name_b or None in (name_a, name_b)):
        return _same(value_a, value_b)
    # The same curve: left minus right differs by a constant factor, and is no constant itself.
    left, right = ("-", *a[1:]), ("-", *b[1:])
    x, y = _at(left), _at(right)
    if not x or not y or _agree(left, ("number", x, 0)):
        return False
    sign = a[0] if x / y > 0 else a[0].translate(_MIRROR)
    return sign == b[0] and _agree(("/", left, right), ("number", x / y, 0))


# ------------------------------------------------------------------------------------ the answers

_WRAPPERS = _rules(  # what is taken off before anything is read, in this order
    r"""
    [‘’] → '
    [“”] → "
    [【「『《«‹]([A-Za-z])[】」』》»›] → (\1)
    (?i)<(b|strong|i|em|u|p|span|mark|code|font|big|div|center|li|option|h[1-6])(?: [^<>]*)?>(?=.*</\1>) → ␣
    (?i)</(?:b|strong|i|em|u|p|span|mark|code|font|big|div|center|li|option|h[1-6])>|<br ?/?> → ␣
    \\\$ → ＄
    \$([^$]*)\$ → ␣\1␣
    (?<!\\)\\␣ → ␣
    [¼-¾⅐-⅞] → ␣\g<0>
    [⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+ → ^{\g<0>}
    [₀₁₂₃₄₅₆₇₈₉]+ → _\g<0>
    (?<![0-9a-z)])\*\*([^*]+)\*\*(?![0-9a-z(]) → ␣\1␣
    (?<!\\)\\[()\[\]]|^\*\*|\*\*(?=\D)|\*\*$|` → ␣
    \\(?:text|mbox|math|operatorname|underline|emph)[a-z]* ?\{([^{}]*)\} → ␣\1␣
    \\text[a-z]* ?\{([^{}]*)\} → ␣\1␣
    ^(?:Both|both)␣ →
    (?<=[A-H)]) are (?:both |all )?(?:correct|right|true)\.?$ →
    ^[-*•·] (?=\(?[A-H]\)?(?:,| and )) →
    ^␣+|[ ,;\\]+$ →
    ^\\f?boxed ?\{((?!.*boxed).*)\}\.?$ → \1
    ^(["'*_]) ?(.+)\1$ → \2
    ^([-$\\]*[0-9][^ ]*(?: [a-z0-9^]+){0,2}) (?:is|are) (?:the|in the|on the) (?!.*\b(?:not|wrong)\b)[A-Za-z ]+\.?$ → \1
    ^[A-Za-z][a-z]{2,}[A-Za-z ]* ?= ?(?=[^=]+=)(?!.*(?<!\\)\b[a-z]{3}) → △␣=␣
    (?<!\.)[.。]$ →
    (?i)^ *(?:so|thus|therefore|hence|∴|=>|⇒|→),?␣+ →
    ^(?:(?:【答案】|因此|所以|综上所述|综上|本题|我|故|正确|答案|选项|选择|应该|应|选|答)[是为,，:： ]*)+(?=.) →
    ^(?:一共|共有|共|有|大约|约|等于)(?=[0-9一二两三四五六七八九十]) →
    ^([A-Za-z]) ?(?:选项|项)?(?:是?正确(?:的|答案)?)?$ → \1
    (?i)^ *(?:approximately|about|around|≈|=|\\approx) *(?=[^a-z]) →
    (?i)^ *(?:the |my )?(?:correct |final )?(?:answer|option|choice)s?(?: is| are|:| =)? *:? *(?:option |choice )?(?=.) →
    (?i)^ *(?:thus|therefore),?␣+ →
    ^(["'*_]) ?(.+)\1\.?$ → \2
    ␣␣+ → ␣
    ^␣|␣$ →
"""
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[, ][0-9][0-9][0-9])+(?![0-9,])")


def _clean(answer):
    """One spelling of wrappers and white space; a long answer only loses white space."""
    text = " ".join(answer.split())
    if len(text) > MAX_LENGTH:
        return text
    text = unicodedata.normalize("NFKC", _rewrite(text, _WRAPPERS))
    if text[:1] in "([{\\":
        return text
    return _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)


_CHOICE = re.compile(  # the letter, what parts it from its text, and the text
    r"(?:[-*+•·●▪◦‣–—>#=→⇒✓✔✅]+ )?[(\[{]? ?([A-Za-z]) ?"
    r"(?:[)\]}.:、。]+|$| - | (?=because |since |as |is correct)|[,;](?! ?[A-Za-z]\b)) ?(.*)"
)
_OTHER_CHOICE = re.compile(
    r"^ ?(?:or|and|/|&)|^\W*[A-Z]\W*$|(?<![^\s,;])(?:[A-Z][.):](?=\s|$)|\([A-Za-z]\))"
    r"|\b(?i:or|no|not|wait|actually|maybe|perhaps|possibly|rather|instead),? (?:option )?[A-Z]\b"
)


def _choice(answer):
    """(letter, text) of a choice: alone, in delimiters or before its text; "" if it is unclear."""
    match = _CHOICE.match(answer)
    if not match or _OTHER_CHOICE.search(match[2]):
        return "", answer
    return match[1].upper(), match[2]


# A statement is a link such as "The area is about", "Perimeter:" or "There are a total of", and then
# its value. Words of doubt before or behind the value spoil it. 400 is MAX_LENGTH.
_LINK = re.compile(
    r"(?!.{400})(?:[^0-9<>≤≥≠?!;]+?(?:\b(?:is|are|was|were|be|equals?|has|have|had|gives|gets?|got"
    r"|costs|measures|contains|takes?|took|needs|weighs|shows|reads|makes|totals|becomes|paid|pays"
    r"|found|see|count(?:ed)?|(?:amounts|comes|adds up) to)\b|'s(?= ?[-\\$0-9])|是|为|等于|有)"
    r"|(?=[^0-9<>≤≥≠?!;=≈:]*?[a-z]{3})[^0-9<>≤≥≠?!;]+?(?:[=≈]|: ))"
    r"(?: ?(?:about|approximately|around|roughly|exactly|only|just|equal to|now|then|thus|therefore"
    r"|also|an? (?:total|sum|value|area|volume|perimeter|length|width|height|radius|diameter) of"
    r"|:|约))* *"
)
_DOUBT = re.compile(
    r"(?i)\b(?:not?|none|never|neither|nor|nobody|nothing|cannot|can|could|may|might|maybe|perhaps"
    r"|possibly|either|or|but|without|except|if|unless|when|where|until|since|because|let|given"
    r"|say|said|thought|supposed?|assumed?|expected|claimed|believed|guess|what|how|wrong|incorrect"
    r"|false|error|than|minus|plus|zero|below|at (?:most|least)|half|twice|double|triple|third"
    r"|quarter|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|million|squared"
    r"|cubed|(?:minimum|maximum|larger|smaller|bigger|greater|longer|shorter|higher|lower)$)\b"
    r"|n't|^of the|times\b|[不没非无或若错倍]|可能|如果"
)
_PLAIN = re.compile(r"(?:(?:[A-Za-z]{2,}|a)(?: |$))+")  # words, such as those behind a value
_MEASURES = {*_KNOWN, "cubic"} - {"in", "times"}  # words that belong to the value itself


def _stated(answer):
    """The value of a statement: 12 cm of "The area is 12 cm wide"; nothing if there is a doubt.

    First comes all that follows the link, then, if the rest is mere words, the value without it.
    """
    value = answer
    while link := _LINK.match(value):
        if _DOUBT.search(link[0]):
            return
        value = value[link.end() :]
    if value != answer:
        yield value
        words = value.split(" ")
        head = list(itertools.takewhile(lambda w: w in _MEASURES or not _PLAIN.match(w), words))
        rest = " ".join(words[len(head) :])
        if _PLAIN.fullmatch(rest) and not _DOUBT.search(rest):
            yield " ".join(head)


@_cached
def _parse(text):
    """The tree of an answer, None if it is not of the language."""
    if re.fullmatch("[A-Za-z][a-z]+", text) and text.lower() not in _SPELLINGS:
        return None  # a word is no product of letters
    parser = _Parser(_tokens(text))
    try:
        tree = parser.parse()
    except ValueError:
        return None
    return tree if parser == [""] else None


def _text(text):
    """The words of an answer without case, its first article and its last punctuation."""
    return " ".join(_tokens(re.sub("^(?:an?|the) |(?<=[a-z])[ .,;:!?]+$", "", text.casefold())))


_OPPOSITES = dict(
    _rows("""
    yes   no|not
    no    yes
    true  false|not
    false true
    """)
)


def answers_match(prediction: str, gold: str) -> bool:
    r"""Whether two answers are the same by the rules in the module docstring.

    An empty or unreadable gold ("N/A", "?") is matched by nothing; one that is a capital letter is
    a choice. Never raises; the time is linear in the lengths.

    >>> answers_match(r"\frac{1}{2}", "0.5"), answers_match("3 4", "12"), answers_match("B. 5", "B")
    (True, False, True)
    """
    prediction, gold = _clean(prediction), _clean(gold)
    if re.fullmatch(r"(?i)n/a|nan|null|[^\w∅∞]*", gold):
        return False
    return any(_match(reading, gold) for reading in (prediction, *_stated(prediction)))


_LETTER = re.compile(r"[(\[{]? ?([A-Z](?= ?[)\]}.:]?$)|[a-h](?=\)$)) ?\W?")
_OPTION = re.compile(  # "B. 12 cm", but neither "A: 5, B: 3" nor "D. C."
    r"\(?([A-H](?=[.)、]|: )|[a-h](?=\) ))[.):、] ?(?!\W*[A-Z]\W*$)"
    r"(?!(?:.*[\s,;])?(?:[A-Z][.):](?:\s|$)|\([A-Z]\)))(?=[\w\\$-])(.+)"
)
_REASON = re.compile(r"$|because |since |as |is correct")  # behind a letter, instead of its text


def _match(prediction, gold):
    """Whether two cleaned answers are the same."""
    letter, text = _choice(prediction)
    gold_letter = _LETTER.fullmatch(gold)
    if gold_letter:
        return letter == gold_letter[1].upper()
    if prediction == gold or max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction == gold
    option = _OPTION.fullmatch(gold)
    if option and letter in ("", option[1].upper()):
        return bool(letter and _REASON.match(text)) or _match(text, option[2])
    opposite = _OPPOSITES.get(gold.lower())
    if opposite:
        verdict = rf"(?i){gold}(?![^,.;:!])(?!.*\b(?:or|maybe|perhaps|{opposite})\b)"
        return bool(re.match(verdict, prediction))
    if ":" in gold:
        prediction = prediction.replace(" to ", ":")  # 2 to 3, but 2-3 is a range
    tree, gold_tree = _parse(prediction), _parse(gold)
    if tree and gold_tree:
        return _same(tree, gold_tree)
    return _text(prediction) == _text(gold) != ""
