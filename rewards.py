r"""The rewards of Observe-R1 (arXiv 2505.12432), safe for anything a policy writes.

What `answers_match` reads, tried from top to bottom; what no row reads is text:

    choice      B   (b)   **B**   B. 12 cm   The correct answer is (B).     two letters are wrong
    list        (2, 3)   [1, 2)   {2, 1}   3 and -3   \pm 3     sets and bare lists in any order
    relation    x = 5   180 - 45 = 135   x \geq 5   5 <= x   2x - y + 1 = 0
    ratio       1:2   12:00     part by part
    quantity    1,345   1 1/2   50%   60^\circ   12 cm   9\pi cm^2     one unit may be missing
    expression  + - * / ^ ( ) { } | |   \frac{1}{2}   \sqrt[3]{8}   2\sqrt{3}   \tan 45^\circ   x_1
    text        case, articles and outer punctuation do not count; "Yes, it is" is yes

Numbers are exact fractions where they can be; a decimal of three or more digits also matches what
rounds to it (3.14 and \pi). 3(4) is 12, 3 4 is nothing. Expressions are equal if they agree at
fixed points. A walk over the tree of Python's parser computes them; nothing is evaluated.
"""

import ast
import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from operator import add, mul, sub, truediv

MAX_LENGTH = 400  # longer answers are compared as text only

def extract_answer(response: str) -> str | None:
    r"""The last complete <answer> block, else an unclosed one, else the last \boxed{}, else None.

    >>> extract_answer("<answer>1</answer> <answer>2</answer>"), extract_answer(r"so \boxed{12}")
    ('2', '12')
    """
    if "<answer>" in response:
        last = response.rfind("<answer>", 0, max(0, response.rfind("</answer>")))
        start = last if last >= 0 else response.rfind("<answer>")
        return response[start + 8:].partition("</answer>")[0]
    start, depth = response.rfind(r"\boxed{"), 0
    for end in range(start + 6, len(response)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if depth == 0:
            return response[start + 7:end]
    return None

_SYMBOLS = {  # LaTeX and Unicode spellings of one thing
    **{"\\" + name: "" for name in "left right displaystyle quad qquad ! $ ( ) [ ]".split()},
    **{"\\" + mark: " " for mark in ",;: "}, **{f"\\{c}frac": r"\frac" for c in "dtc"},
    **{"\\" + pair[:-1]: pair[-1] for pair in (
        "cdot* times* ast* div/ leqslant≤ geqslant≥ leq≤ geq≥ le≤ ge≥ neq≠ ne≠ lt< gt> pm± infty∞ "
        "emptyset∅ varnothing∅ angle∠ degree° circ° {{ }} %% OmegaΩ muμ piπ alphaα betaβ gammaγ "
        "thetaθ phiφ varphiφ lambdaλ").split()},
    **dict(pair.split(" ") for pair in "− -|– -|— -|× *|· *|⋅ *|÷ /|√ \\sqrt|∘ °|<= ≤|>= ≥|"
           "!= ≠|⁄ /".split("|")), "~": " ", "$": "", "≈": "",
}
_SYMBOL = re.compile("|".join(re.escape(key) + "(?![a-zA-Z])" * (len(key) > 1 and key[-1].isalpha())
                              for key in sorted(_SYMBOLS, key=len, reverse=True)))
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_LEAD = re.compile(r"^(?:so |thus |therefore,? |hence )?(?:the )?(?:correct |final )?"
                   r"(?:answer|option|choice)(?: is|:| =)? *:? *(?:option |choice )?(?=.)", re.I)
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:[, ][0-9]{3})+)(?![0-9,])")

def _clean(answer: str) -> str:
    """One spelling of wrappers, symbols and white space; a long answer only loses white space."""
    text = " ".join(answer.split())
    if len(text) > MAX_LENGTH:
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", r"^\g<0>", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    text = unicodedata.normalize("NFKC", text.replace("º", "°"))  # ½ is 1⁄2, ² is 2
    text = _WRAPPED.sub(r" \1 ", _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], text))
    text = re.sub(r"\^ ?(?:\{ ?°? ?\}|°)|\^o\b", "°", re.sub(r"\^ ?\{ ?° ?\}", "°", text))
    for _ in range(4):  # wrappers nest: **\boxed{...}**
        text = text.strip(" \t.,;`\"'").removeprefix("**").removesuffix("**")
        boxed = re.fullmatch(r"\\(?:boxed|fbox) ?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", text)
        text = boxed[1] if boxed else _LEAD.sub("", text, count=1)
    text = " ".join(text.replace("**", "^").split())
    return text if text[:1] in "([{" else _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[1]), text)

def _choice(answer: str) -> str | None:
    """The letter of a choice: alone, in delimiters or before its text; None if unclear."""
    alone = re.fullmatch(r"[(\[{]? ?([A-Za-z]) ?[)\]}.:]?", answer)
    marks = re.findall(r"(?:^|(?<=[\s,;]))(?:\(([A-Z])\)|([A-Z])[.):](?=\s|$)|([A-Z]) - )", answer)
    letters = {alone[1].upper()} if alone else {"".join(mark) for mark in marks}
    starts = alone or re.match(r"\(?[A-Z](?:\)|[.:] | - )", answer)
    return letters.pop() if starts and len(letters) == 1 else None

_FUNCTIONS = {  # and constants; frac and sqrt[n] take their arguments one by one
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "exp")}, "ln": math.log,
    "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan, "log": math.log10, "abs": abs,
    "frac": lambda top: lambda bottom: top / bottom, "sqrt": lambda radicand: _root(radicand, 2),
    "π": math.pi, "e": math.e, "inf": math.inf}
_OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
_MIXED = re.compile(r"(?<![\w.^])([0-9]+) ?(?: ([0-9]+) ?/ ?([0-9]+)|"
                    r"\\frac ?\{([0-9]+)\} ?\{([0-9]+)\})(?![\w.])")  # 1 1/2, but not 11/2
_TOKEN = re.compile(r" *(?:0*((?:[0-9]+(?:\.[0-9]*)?(?:e-?[0-9]+)?|\.[0-9]+)(?: ?°)?)|\\?("
                    + "|".join(sorted({*_FUNCTIONS} - {"π", "e", "inf"}, key=len, reverse=True))
                    + r")(?![a-z])|([^\W\d_](?![A-Za-z]{2})(?:_\w)?|∞)|([-+*/^()\[\]°]))")

def _parse(text: str) -> ast.expr:
    """Python's syntax tree of LaTeX or plain arithmetic; ValueError or SyntaxError if neither."""
    text = _MIXED.sub(lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)
    text = re.sub(r"\\frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", re.sub(r"_\{(\w)\}", r"_\1", text))
    text = re.sub(r"\|([^|]+)\|", r" abs(\1)", text).replace("{", "(").replace("}", ")")
    if _TOKEN.sub("", text).strip():
        raise ValueError("a word, or a symbol of something else")
    source = before = ""  # before: what the last token was
    for number, name, letter, mark in _TOKEN.findall(text):
        if before == "atom" and not mark:
            if number:
                raise ValueError("two numbers side by side are no product")
            source += "*"
        atom = number.replace(" ", "").replace("°", "*deg") or letter.replace("∞", "inf")
        source += f"({atom})" if atom and before == "name" else (
            atom or name or {"^": "**", "°": "*deg"}.get(mark, mark))
        before = "name" if name else "atom" if atom or mark in ")°" else ""
    return ast.parse(source, mode="eval").body

def _root(radicand, n):
    near = round(abs(radicand) ** (1 / float(n))) if abs(radicand) < 1e12 else 0
    return Fraction(near) if near ** n == radicand else math.pow(radicand, 1 / n)

def _compute(node: ast.expr, point: int, degree: float):
    """Value of a syntax tree at a fixed point, a Fraction if it can be."""
    value = functools.partial(_compute, point=point, degree=degree)
    match node:
        case ast.Constant():
            return Fraction(repr(node.value))
        case ast.Name(id=name):
            code = sum((i + 1) * ord(c) for i, c in enumerate(name))  # some values below zero
            letter = Fraction(code * (point + 3) * 7919 % 997 - 400, 211)
            return degree if name == "deg" else _FUNCTIONS.get(name, letter)
        case ast.UnaryOp():
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        case ast.Subscript(value=ast.Name(id="sqrt"), slice=n):
            return lambda radicand: _root(radicand, value(n))
        case ast.Call(func=left, args=[right]):  # sin(x), or a product: 2(x + 1)
            left, right = value(left), value(right)
            return left(right) if callable(left) else left * right
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = value(left), value(right)
            bits = base.numerator.bit_length() if isinstance(base, Fraction) else 1
            if abs(exponent) > 1000 or bits * abs(exponent) > 4000:
                raise ValueError("too large")
            return base ** exponent
        case ast.BinOp(left=left, right=right):
            return _OPERATORS[type(node.op)](value(left), value(right))
    raise ValueError("not an expression")

def _evaluate(text: str, point: int = 0):
    """Value of an expression at a fixed point (Fraction or float), None if it has none there."""
    if not text or len(text) > MAX_LENGTH or not re.search(r"[0-9π∞*/+^|-]|^[^\W\d_](_\w)?$", text):
        return None  # a bare word is text, not a product of letters
    try:
        angle = math.pi / 180 if re.search("sin|cos|tan", text) else 1  # of one degree
        value = _compute(_parse(text), point, angle)
        return None if isinstance(value, complex) or math.isnan(value) else value
    except Exception:  # whatever a policy wrote: it is no expression
        return None

_UNITS = dict(pair.split(":") for pair in (
    "percent:% degree:° deg:° centimeter:cm centimetre:cm millimeter:mm meter:m metre:m "
    "kilometer:km kilometre:km gram:g kilogram:kg liter:l litre:l second:s sec:s minute:min hour:h "
    "hr:h inch:in inche:in feet:ft foot:ft dollar:$").split())
_UNIT = re.compile(
    r"(.*?[0-9πe})|°\w])( ?%| ?°| +(?!(?:or|and|more|less|than|not|to|at|least|most)\b)"
    r"(?:[mslgLNJWVAKhCΩF]|[^\W\d_]{2,})(?:[ ./*^-]*(?:[^\W\d_]+|[0-9]))*\.?|(?<=[0-9]) ?"
    r"(?:[cmk]?m|k?g|m[lL]|ft|in)(?:\^?[23])?)")
_DECIMAL = re.compile(r"-? ?([0-9]*)\.([0-9]+)")  # of three digits or more: may be rounded
_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}

def _quantity(text: str) -> tuple[str, str]:
    """Number and unit, the unit in one spelling: '12 square centimeters' -> ('12', 'cm^2')."""
    match = _UNIT.fullmatch(text)
    if not match or _evaluate(match[1]) is None or re.search("sin|cos|tan", text):
        return text, ""
    unit = re.sub(r"[^\W\d_]{2,}", lambda m: _UNITS.get(m[0].lower().removesuffix("s"), m[0]),
                  match[2])
    unit = re.sub(r"\b(square|sq|cubic)\b\.? *([^\W\d_]+)",
                  lambda m: m[2] + ("3" if m[1] == "cubic" else "2"), unit)
    return match[1].strip(), re.sub(r"[ .^*]+", "", unit)

def _same_number(a, b, places: int = 0) -> bool:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    within = 0.5000001 * 10 ** -places if places else 0 if exact else 1e-9 * max(abs(a), abs(b))
    return a == b or abs(a - b) <= within

def _same_quantity(a: str, b: str) -> bool:
    """Both are expressions of the same value, or of the same values at several points."""
    (a, unit_a), (b, unit_b) = _quantity(a), _quantity(b)
    x, y = _evaluate(a), _evaluate(b)
    if x is None or y is None or unit_a and unit_b and unit_a != unit_b:
        return False
    # 50% is 50 or 0.5, 90 degrees is 90 or pi/2, if the other side has no unit
    factor = {"%": Fraction(1, 100), "°": math.pi / 180}.get(unit_a + unit_b)
    if factor and (_same_number(x * factor, y) if unit_a else _same_number(x, y * factor)):
        return True
    decimals = filter(None, map(_DECIMAL.fullmatch, (a, b)))
    places = min((len(m[2]) for m in decimals if len((m[1] + m[2]).lstrip("0")) > 2), default=0)
    pairs = [(_evaluate(a, k), _evaluate(b, k)) for k in range(4)]
    return all(_same_number(s, t, places if s == x else 0) for s, t in pairs
               if s is not None and t is not None)

def _items(text: str) -> tuple[str, list[str], str] | None:
    """(opening, items, closing) of a list, '' and '' if it is bare; None if it is no list."""
    if text.count("±") == 1:
        return "{", [text.replace("±", "+").lstrip("+ "), text.replace("±", "-")], "}"
    whole = re.fullmatch(r"([(\[{])(?![^(\[{]*[)\]}].)(.*)([)\]}])", text)  # not (1)(2)
    opening, inner, closing = whole.groups() if whole else (
        "", re.sub(r",? (?:and|or) ", ",", text), "")
    items = [item.strip() for item in re.split(r"[,;](?![^(\[{]*[)\]}])", inner)]
    return (opening, items, closing) if len(items) > 1 or opening == "{" else None

def _same_list(a, b) -> bool:
    (open_a, a, close_a), (open_b, b, close_b) = a, b
    if len(a) != len(b) or open_a and open_b and open_a + close_a != open_b + close_b:
        return False
    if open_a in ("(", "[") or open_b in ("(", "[") or len(a) > 12:
        return all(map(_same, a, b))
    # sets and bare lists, in any order: each item as often in one as in the other
    return all(sum(_same(x, y) for y in b) == sum(_same(x, y) for y in a) > 0 for x in a)

def _solved(text: str) -> tuple[str, str]:
    """(name, value) of x = 5, 5 = x or 180 - 45 = 135; ('', text) of anything else."""
    sides = [side.strip() for side in text.split("=")]
    names = [bool(re.fullmatch(r"(?:[^\W\d]|[(){} ,'∠\\]|_\{?\d\}?){1,30}", s)) for s in sides]
    if len(sides) == 2 and names[0] != names[1]:
        return tuple(sides if names[0] else sides[::-1])
    values = [_evaluate(_quantity(side)[0]) for side in sides[names[0]:]]
    if len(sides) > 1 and None not in values and all(_same_number(v, values[0]) for v in values):
        return (sides[0] if names[0] else ""), sides[-1]
    return "", text

def _same_relation(a: str, b: str) -> bool:
    """Equations and inequalities; an equation that names its value may stand for the value."""
    (name_a, value_a), (name_b, value_b) = _solved(a), _solved(b)
    if (name_a or value_a != a or "=" not in a) and (name_b or value_b != b or "=" not in b) and (
            not re.search("[<>≤≥≠]", a + b)):
        return (not name_a or not name_b or name_a == name_b) and _same(value_a, value_b)
    left, right = (re.split("([=<>≤≥≠])", side) for side in (a, b))
    flipped = str.maketrans("<>≤≥", "><≥≤")
    for sides in (left, [part.translate(flipped) for part in left[::-1]]):
        if sides[1::2] == right[1::2] and all(map(_same, sides[::2], right[::2])):
            return True
    if left[1::2] == right[1::2] == ["="]:  # the same curve
        pairs = [[_evaluate(f"({l})-({r})", k) for l, _, r in (left, right)] for k in range(3)]
        if all(None not in pair and pair[1] for pair in pairs):
            return all(_same_number(p / q, pairs[0][0] / pairs[0][1]) for p, q in pairs)
    return False

def _text(text: str) -> str:
    text = re.sub(r"(?<=[^\w\s]) | (?=[^\w\s])", "", text)
    text = " ".join(text.lower().replace("\\", " ").split()).strip(" .,;:!?")
    text = re.sub(r"^(?:an?|the) ", "", text)
    return _WORDS.get(text, text)

def _same(a: str, b: str) -> bool:
    """Two cleaned answers, no choices: the rows of the table in the module docstring."""
    plain_a, plain_b = _text(a), _text(b)
    if plain_a == plain_b or max(len(a), len(b)) > MAX_LENGTH:
        return plain_a == plain_b != ""
    if plain_b in ("yes", "no", "true", "false"):
        return bool(re.match(plain_b + "[,.;]", a.lower()))
    lists = _items(a), _items(b)
    if all(lists):
        return _same_list(*lists)
    if re.search("[=<>≤≥≠]", a + b):
        return _same_relation(a, b)
    if any(lists):
        return False
    if ":" in a and ":" in b:
        a, b = a.split(":"), b.split(":")
        return len(a) == len(b) and all(_same(x.strip(), y.strip()) for x, y in zip(a, b))
    a, b = (plain if plain.isdigit() else x.replace(":", "/")
            for plain, x in ((plain_a, a), (plain_b, b)))  # "three" is 3
    return _same_quantity(a, b)

def answers_match(prediction: str, gold: str) -> bool:
    r"""Whether two answers are the same by the rules in the module docstring.

    An empty or unreadable gold ("N/A", "?") is matched by nothing; one that is a capital letter is
    a choice. Never raises; the time is linear in the lengths.

    >>> answers_match(r"\frac{1}{2}", "0.5"), answers_match("3 4", "12"), answers_match("B. 5", "B")
    (True, False, True)
    """
    prediction, gold = _clean(prediction), _clean(gold)
    if gold.lower() in ("n/a", "nan", "null") or not re.search(r"\w|[∅∞°∠√]", gold):
        return False
    if re.fullmatch(r"[(\[]?[A-Z][)\].:]?", gold):
        return _choice(prediction) == _choice(gold)
    return _same(prediction, gold)

def accuracy_reward(response: str, gold: str) -> float:
    """1.0 if the final answer of the response matches the gold, else 0.0: the paper's accuracy.

    >>> accuracy_reward("<think>3 + 4</think><answer>7</answer>", "7"), accuracy_reward("7", "7")
    (1.0, 0.0)
    """
    answer = extract_answer(response)
    return float(answer is not None and answers_match(answer, gold))

def format_reward(response: str, observe: bool = True) -> float:
    """The paper's format reward: 0.5 if the blocks stand as asked, else 0.0. Linear time.

    observe, think, answer in this order with only white space between, or observe inside think;
    each tag once, no block blank; text around is tolerated. observe=False: think and answer alone.

    >>> format_reward("<observe>a</observe> <think>b</think> <answer>c</answer>")
    0.5
    """
    names = ("observe", "think", "answer") if observe else ("think", "answer")
    pieces = re.split(f"(</?(?:{'|'.join(names)})>)", response)
    tags, texts = pieces[1::2], [text.strip() for text in pieces[2:-1:2]]
    if tags == [f"<{slash}{name}>" for name in names for slash in ("", "/")]:
        return 0.5 if all(texts[::2]) and not any(texts[1::2]) else 0.0
    if tags == ["<think>", "<observe>", "</observe>", "</think>", "<answer>", "</answer>"]:
        before, seen, after, gap, answer = texts
        return 0.5 if before + after and seen and answer and not gap else 0.0
    return 0.0

def bonus_rewards(correct: Sequence[bool], lengths: Sequence[int], min_length: int = 100,
                  bonus: float = 0.2) -> list[float]:
    """The bonus to the shortest correct response of a group, if it is longer than min_length.

    The floor keeps "be short" from becoming "do not reason": below it nobody gets the bonus. Ties
    go to the first. lengths: tokens with the stop token. ValueError if the sequences do not fit.

    >>> bonus_rewards([True, True, False], [300, 200, 50])
    [0.0, 0.2, 0.0]
    """
    if not correct or len(correct) != len(lengths) or min(lengths) < 0:
        raise ValueError(f"a group needs one length >= 0 a response: {len(correct)} of {lengths}")
    right = [i for i, is_correct in enumerate(correct) if is_correct]
    shortest = min(right, key=lambda i: lengths[i], default=None)
    paid = shortest is not None and lengths[shortest] > min_length
    return [bonus if paid and i == shortest else 0.0 for i in range(len(correct))]

def dynamic_weight(correct: Sequence[bool], sigma: float = 1.8) -> float:
    """w(d) = 4 sigma d (1 - d) for the share d of correct responses (the paper's weight).

    Half-solved groups weigh sigma, solved and hopeless ones 0. ValueError for an empty group.

    >>> [dynamic_weight([True] * n + [False] * (8 - n)) for n in (0, 1, 4, 8)]
    [0.0, 0.7875, 1.8, 0.0]
    """
    if not correct:
        raise ValueError("a group needs at least one response")
    right, n = sum(map(bool, correct)), len(correct)
    return 4 * sigma * right * (n - right) / (n * n)
