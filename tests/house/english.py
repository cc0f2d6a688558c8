"""Rules of language that a machine can check, as a script and as functions of the test beside it.

python tests/house/english.py src/niwaki/kernels
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_WORDS = 25
OPENINGS = re.compile(
    r"^(what|which|how|whether|who|whoever|whose|where|when|of|so many|as so many|as many|for|from|to|with|without|none"
    r"|nothing|nobody|everything|everyone|one that|that|those|these|it|its|there|and|or)\b",
    re.IGNORECASE,
)
BANNED = re.compile(
    r"\b(anew|whoever|whatever|nobody|so many|so much|a second time|as many as there|behind which|otherwise than"
    r"|nothing but|be it|for good|at the most|at the least|as ever|of whom)\b",
    re.IGNORECASE,
)
# "Behind" is a place (behind a gateway), never a time: say after.
BEHIND = re.compile(r"\bbehind\b(?! (a|the|one|niwaki's|its) (gateway|proxy|load balancer|server))", re.IGNORECASE)
# "X is no Y" reads as archaic: say "is not a Y". "There is no Y" and "is no longer" are fine.
IS_NO = re.compile(
    r"(?<!there )\b(is|are) no (?!(longer|larger|less|more|worse|better|smaller|fewer|slower|faster|further)\b)",
    re.IGNORECASE,
)
VERBS = set(
    """
accept accumulate add adjust advance allocate answer append apply approximate ask assemble assert assign attach
average back balance begin bench bind binarize bound break build bytes cache calibrate call cancel cap carry cast
change check choose clamp clear close code collect combine compare compile complete compose compress compute
concatenate configure connect consume continue convert copy correct count cover create cut decide declare decode
decompress dequantize defer delete deliver derive describe descend detach detect determine discard distribute divide
download draw drain drive drop dump embed emit empty encode end enforce enter escape estimate evaluate exclude execute
exit expand explain export express extend extract fail fake feed fetch fill filter find finish fit fix flatten flush
fold follow force format forward free freeze fuse gather generate get give go group guard guess handle hash hold
identify ignore implement import include increase infer initialize insert inspect install interleave intersect invert
iterate join judge keep kill label launch lay learn leave limit link list load locate lock log look lower make map
mark mask match measure merge minimize mix move multiply name narrow negotiate normalize note number observe offer
open order pack pad pair parse partition pass patch pause permute pick place plan play plot point pool pop post
predict prefill prepare print process produce promote prompt propagate propose protect prove prune publish pull push
put quantize query queue quote raise rank reach read rebuild receive recommend reconstruct record recover reduce
refine refuse register reject release reload remember remove rename render repair repeat replace replay report
represent request require rescale reset reshape resize resolve respond restart restore restrict resume retire retry
return reuse reverse rewrite rotate round route run sample satisfy save say scale scan score search seed select send
separate serialize serve set share shift show shrink shuffle shut silence simulate skip slice slide smooth solve sort
spend split spread stack start state step stop store stream strip subtract suggest sum supply swap sweep switch take
tell test tie time tokenize total touch trace track train transform translate transpose try tune turn undo unpack
update upload use validate verify visit wait walk warn watch weigh widen wrap write yield zero do exchange discover
submit interrupt reorder
""".split()  # noqa: SIM905
)


def docstrings(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Yield every node of a file that has a docstring, with it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of the prose in a docstring: no code, no lists, no tables, no legends."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if any(line.startswith(("    ", "- ", "* ", "|", "Legend", ">>>", "$ ")) for line in lines):
            continue
        if re.search(r"[─►→]{2}|─►|\S {3}", paragraph):  # a picture or a table of words
            continue
        prose = re.sub(r"`[^`]*`", "`x`", " ".join(lines))
        prose = re.sub(r"\b(e\.g|i\.e|cf|vs|et al)\.", r"\1", prose)
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z`‖Σ0-9])|(?<=\.\))\s+", prose)


def faults_of_docstring(node: ast.AST, text: str) -> Iterator[str]:
    """Yield the rules that one docstring breaks."""
    first = text.strip().split()[0]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if first.strip(".,:;").lower() not in VERBS:
            yield f"begin with a verb in the imperative, not {first!r}"
    elif OPENINGS.match(text):
        yield f"begin with a noun phrase, not {first!r}"
    for sentence in sentences(text):
        count = len(sentence.split())
        if count > MAX_WORDS:
            yield f"a sentence has {count} words, at most {MAX_WORDS}: {sentence[:60]}"


def faults_of_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers of a text and the banned words that stand there."""
    for number, line in enumerate(text.splitlines(), 1):
        for rule in (BANNED, BEHIND, IS_NO):
            for found in rule.finditer(line):
                yield number, f"say it without {found[0]!r} (docs/glossary.md)"


def faults(path: Path) -> list[str]:
    """Return every rule that a file breaks, one line each."""
    found = []
    if path.suffix == ".py":
        for node, text in docstrings(path):
            found += [f"{path}:{getattr(node, 'lineno', 1)}: {fault}" for fault in faults_of_docstring(node, text)]
    words = faults_of_words(path.read_text(encoding="utf-8"))
    return found + [f"{path}:{number}: {fault}" for number, fault in words]


def main() -> None:
    """Print the faults of the files and folders that the command line names."""
    places = [Path(argument) for argument in sys.argv[1:]]
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    found = [fault for path in files for fault in faults(path)]
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
