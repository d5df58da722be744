"""Whether an answer that was put into other words still comes to the same.

What has to survive depends on the reference answer. The first rule that holds gives its kind:

1. `call`: it holds a JSON object with a name and arguments, or is nothing but calls `name(…)`.
2. `code`: it holds a code fence.
3. `number`: it names its result (`#### 42`, `\\boxed{42}`, "the answer is 42"), or is nothing
   but a number with its unit.
4. `code`: it is Python of more than one expression, or half of its lines look like code.
5. `number`: the question asks for one (how many, calculate, …) and the last sentence holds one.
6. `exact`: one line of up to five words that is no sentence, such as a label.
7. `free`: anything else; nothing is checked.

The checks refuse too much rather than too little: a good rewrite that is refused costs
little, a wrong one that is kept teaches an error. No code is run. Every check is linear in
the length of the texts and takes any text.
"""

import ast
import re
from typing import Literal

from recoup.schemas import Prompt
from recoup_ml.calls import json_calls, keeps_calls, parsed, python_calls
from recoup_ml.numerals import is_quantity, last_number, marked_number

AnswerKind = Literal["number", "code", "call", "exact", "free"]

LABEL_WORDS, LABEL_LENGTH = 5, 80
SENTENCE_WORDS = 4
"""A sentence has at least so many words, a capital and a full stop."""
LANGUAGES = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript", "sh": "bash"}
"""Short names of languages, as code fences carry them."""
STATEMENTS = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom),
    *(ast.For, ast.While, ast.If, ast.With, ast.Try),
)
_ASKS_FOR_NUMBER = re.compile(
    r"\bhow (?:many|much)\b|\b(?:calculate|compute|solve)\b|\bwhat is [-(]?\d|\b(?:find|what is) the "
    r"(?:sum|total|average|mean|median|product|difference|area|perimeter|volume|percentage)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_DEFINED = re.compile(
    r"^[ \t]*(?:(?:public|private|static|export|async|abstract|final)[ \t]+)*"
    r"(?:def|class|function|func|fn|struct|interface)[ \t]+(\w+)",
    re.MULTILINE,
)


def answer_kind(prompt: Prompt) -> AnswerKind:
    """What of the prompt's reference answer has to survive, by the rules above."""
    question, reference = prompt.messages[-1].content, (prompt.completion or "").strip()
    if json_calls(reference) or python_calls(reference):
        return "call"
    if "```" in reference:
        return "code"
    if marked_number(reference) or is_quantity(reference):
        return "number"
    if _looks_like_code(reference):
        return "code"
    if _ASKS_FOR_NUMBER.search(question) and last_number(_SENTENCE_END.split(reference)[-1]):
        return "number"
    return "exact" if _is_label(reference) else "free"


def answer_survives(rewrite: str, prompt: Prompt) -> bool:
    """Whether `rewrite` has the number, the code, the calls or the label of the reference answer.

    The number has to be the rewrite's last one.
    """
    reference = prompt.completion or ""
    match answer_kind(prompt):
        case "number":
            wanted, found = marked_number(reference) or last_number(reference), last_number(rewrite)
            return wanted is not None and found is not None and found.same(wanted)
        case "code":
            return _keeps_code(rewrite, reference)
        case "call":
            return keeps_calls(rewrite, reference)
        case "exact":
            return holds(rewrite, reference)
        case "free":
            return True


def holds(text: str, label: str) -> bool:
    """Whether the label stands in the text as whole words, whatever their case and spacing.

    Signs around the label do not count.
    """
    bare = label.strip(".,:;!?\"'“”‘’`* \n") or label
    return f" {_words(bare)} " in f" {_words(text)} "


def _is_label(reference: str) -> bool:
    words = len(reference.split())
    short = 0 < words <= LABEL_WORDS and len(reference) <= LABEL_LENGTH and "\n" not in reference
    return short and not (words >= SENTENCE_WORDS and reference[0].isupper() and reference[-1] in ".!?")


def _words(text: str) -> str:
    """Words and signs, each between spaces."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.casefold().replace("’", "'")))


def _looks_like_code(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    code = [line for line in lines if line.endswith((";", "{", "}")) or line.startswith(("<", "#include"))]
    return _is_python(text) or 2 * len(code) >= len(lines) > 0


def _is_python(code: str) -> bool:
    """Python that does something: words and numbers are expressions, `E = mc2` is an assignment."""
    tree = parsed(code)
    body = tree.body if tree else []
    acts = [node for node in body if isinstance(node, ast.Assign | ast.AugAssign) or _is_call(node)]
    return any(isinstance(node, STATEMENTS) for node in body) or (len(body) > 1 and bool(acts))


def _is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _keeps_code(rewrite: str, reference: str) -> bool:
    """Whether the rewrite is fenced, in one language with the reference, parses and defines its names.

    Nothing is asked of it that the reference itself does not do.
    """
    fenced, blocks = _blocks(reference), _blocks(rewrite)
    if (fenced and not blocks) or not _share_language(fenced, blocks):
        return False
    wanted, found = fenced or [("", reference)], blocks or [("", rewrite)]
    defined = {name for _, code in wanted for name in _DEFINED.findall(code)}
    if not defined <= {word for _, code in found for word in re.findall(r"\w+", code)}:
        return False
    python = [code for language, code in found if language == "python"]
    parses = all(parsed(code) for code in python) and any(parsed(code) for _, code in found)
    return parses or not any(_is_python(code) for _, code in wanted)


def _share_language(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> bool:
    """Whether one language is named by both; blocks without a name may be in any."""
    named, others = ({language for language, _ in blocks if language} for blocks in (ours, theirs))
    return not named or not others or bool(named & others)


def _blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text as (language, code)."""
    return [_block(*part.partition("\n")) for part in text.split("```")[1::2]]


def _block(label: str, newline: str, code: str) -> tuple[str, str]:
    if not newline:
        return "", label
    name = label.lower().split()[:1]
    return "".join(LANGUAGES.get(word, word) for word in name), code
