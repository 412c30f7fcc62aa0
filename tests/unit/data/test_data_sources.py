"""Sources: documents in a fixed order, bad input named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megamem.errors import ConfigError, DataError
from megamem_data.config import SourceConfig
from megamem_data.sources import SourceCounts, list_files, read_documents


def read(*sources: SourceConfig, strict: bool = False) -> tuple[list[str], SourceCounts]:
    counts = SourceCounts()
    return list(read_documents(sources, strict=strict, counts=counts)), counts


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_folder_is_read_in_sorted_order_without_hidden_empty_or_binary_files(tmp_path: Path) -> None:
    folder = write(
        tmp_path, b_txt="two", a_txt="one", sub__c_txt="three", d_txt=" \n", e_bin=b"\x00\x01", _git__x_txt="no"
    )
    assert (folder / ".git" / "x.txt").exists()
    texts, counts = read(SourceConfig(path=str(folder)))
    assert texts == ["one", "two", "three"]
    assert (counts.documents, counts.empty, counts.binary) == (3, 1, 1)
    assert read(SourceConfig(path=str(folder), pattern="*.txt", max_documents=1))[0] == ["one"]
    assert read(SourceConfig(path=str(folder / "b.txt")), SourceConfig(path=f"{folder}/a*"))[0] == ["two", "one"]
    with pytest.raises(DataError, match=r"e\.bin holds NUL bytes"):
        read(SourceConfig(path=str(folder)), strict=True)


def test_invalid_utf8_is_counted_and_replaced_or_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, good_txt="gut für", bad_txt="für".encode("latin-1"))
    texts, counts = read(SourceConfig(path=str(folder)))
    assert texts == ["f\ufffdr", "gut für"] and counts.invalid_utf8 == 1
    with pytest.raises(DataError, match=r"bad\.txt is not valid UTF-8 \(byte 1\)"):
        read(SourceConfig(path=str(folder)), strict=True)


def test_missing_and_unreadable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources\[0\]: no file matches .*nowhere"):
        read(SourceConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"\*\.md in"):
        read(SourceConfig(path=str(tmp_path), pattern="*.md"))
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"broken\.jsonl\.gz .* cannot be read"):
        read(SourceConfig(kind="jsonl", path=str(tmp_path)))
    for pattern in ("", "/etc/*"):
        with pytest.raises(ConfigError, match="set a glob below path"):
            SourceConfig(path="x", pattern=pattern)
    with pytest.raises(ConfigError, match="path is empty"):
        SourceConfig(kind="jsonl")


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"id": i, "body": f"text {i}\nmore"}) for i in range(3)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    texts, _ = read(SourceConfig(kind="jsonl", path=str(tmp_path), text_field="body"))
    assert texts == [f"text {i}\nmore" for i in range(3)] * 2
    with pytest.raises(DataError, match=r"line 1 of .*a\.jsonl has no text under 'text'; .*: body"):
        read(SourceConfig(kind="jsonl", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"), [("{broken", "line 2 of .* is not JSON"), ("[1]", "line 2 of .* no JSON object")]
)
def test_a_malformed_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        read(SourceConfig(kind="jsonl", path=str(tmp_path)))


def test_half_a_surrogate_pair_in_json_is_repaired(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}')
    texts, counts = read(SourceConfig(kind="jsonl", path=str(tmp_path)))
    assert texts[0].encode().decode() == texts[0] and counts.invalid_utf8 == 1


def test_standard_library_is_sorted_and_holds_no_installed_package() -> None:
    files = list_files(SourceConfig(kind="python_stdlib"))
    assert files == sorted(files) and len(files) > 300
    assert Path(json.__file__) in files
    assert not [path for path in files if "site-packages" in path.parts]
    texts, counts = read(SourceConfig(kind="python_stdlib", max_documents=5))
    assert len(texts) == counts.documents == 5
    assert texts == read(SourceConfig(kind="python_stdlib", max_documents=5))[0]


def test_datasets_source_streams_and_explains_failures(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)))
    options = {"data_files": str(tmp_path / "rows.json")}
    texts, _ = read(SourceConfig(kind="datasets", path="json", options=options, max_documents=3))
    assert texts == ["row 0", "row 1", "row 2"]
    with pytest.raises(DataError, match=r"row 0 of json has no text under 'body'; .*: text"):
        read(SourceConfig(kind="datasets", path="json", options=options, text_field="body"))
    with pytest.raises(DataError, match=r"data\.sources\[0\]: datasets\.load_dataset\('json', split='other'\) failed"):
        read(SourceConfig(kind="datasets", path="json", options=options, split="other"))
