"""The page: every section, nothing from the network, nothing unescaped; and the numbers under it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from salr.converter.report import size_report
from salr.formats.errors import SalrError
from salr.formats.reader import SalrFile

import salr
from salr.evaluation.charts import Part, size_text, stacked_bars
from salr.evaluation.heat_map import cells_of, heat_map
from salr.evaluation.markup import Markup, tag, together
from salr.evaluation.report_data import adapter_rows, headline, kind_labels, kinds, module_rows, split_name
from salr.evaluation.report_html import report_page, write_report
from salr.evaluation.results import EvalResult, Evaluation
from salr.evaluation.spectrum import residual_decay, singular_values

SECTIONS = [
    "Where the bytes are", "Error by layer", "What the residual adapters hold", "How the budget is spread",
    "Adapters", "Evaluation", "Recipe", "Provenance",
]  # fmt: skip
VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """A page taken in: it must nest properly; texts, headings and attributes are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [text for inside, text in self.texts if inside == tag]


def result(model, **values):
    fields = {
        "architecture": "LlamaForCausalLM", "is_reference": False, "perplexity": 25.5, "nll": 3.24, "n_scored": 1023,
        "n_windows": 1, "n_tokens": 1024, "n_bytes": 10**6, "bits_per_weight": 12.5, "seconds": 1.0,
    }  # fmt: skip
    return EvalResult(model=model, **fields | values)


def evaluation(*results):
    protocol = {"text": "wiki.txt", "window": 1024, "stride": 1024, "precision": "float32", "device": "cpu"}
    return Evaluation(protocol, results)


@pytest.fixture(scope="module")
def compared():
    reference = result("dir/source", is_reference=True, perplexity=21.25, ratio=1.0, agreement=1.0, kl=0.0)
    return evaluation(reference, result("x/reader.salr", ratio=1.2, agreement=0.875, kl=0.125))


def test_the_page_has_every_section_and_nests(reader_salr, compared):
    page = Page(report_page(SalrFile(reader_salr), compared))
    assert page.of("h1") == ["reader.salr"] and page.of("h2") == SECTIONS
    assert page.tags.count("svg") >= 5 and page.tags.count("html") == page.tags.count("main") == 1


def test_without_evaluation_adapters_or_modules_the_page_still_stands(packed, draft, tmp_path):
    assert Page(report_page(SalrFile(packed))).of("h2") == [s for s in SECTIONS if s != "Evaluation"]
    draft.manifest["modules"] = {}
    for name in set(draft.tensors) - {"norm.weight", "assets/config.json"}:
        draft.drop(name)
    bare = Page(report_page(SalrFile(draft.write(tmp_path / "bare.salr"))))
    assert bare.of("h2") == ["Where the bytes are", "Adapters", "Recipe", "Provenance"]


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(reader_salr, compared):
    text = report_page(SalrFile(reader_salr), compared)
    page = Page(text)
    assert not re.search(r"https?:|//|@import|url\(|javascript:", text)
    assert not {"script", "link", "img", "iframe", "object", "use", "base", "form"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name in ("href", "src", "srcset") or name.startswith("on")}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_numbers_on_the_page_are_those_of_the_file(reader_salr, compared):
    file = SalrFile(reader_salr)
    words = " ".join(text for _, text in Page(report_page(file, compared)).texts)
    sizes, numbers = size_report(file), headline(file)
    for expected in (
        size_text(sizes.values_bytes), size_text(sizes.adapter_bytes), f"{numbers.bits_per_weight:.2f}",
        f"{numbers.bits_without_adapters:.2f} without adapters", f"{100 * numbers.error_residual:.1f}",
        "style", "PEFT LoRA", "25.50", "21.25", "1.200x", "87.5 %", "0.1250", "this file", "magnitude", "config.json",
        "14 matrices",
    ):  # fmt: skip
        assert expected in words, expected


def test_names_from_file_and_results_are_escaped(draft, tmp_path):
    evil = "<script>alert(1)</script>\"&'<b>"
    draft.manifest["generator"] = evil
    draft.manifest["options"] = {evil: evil, "set": [[evil, {evil: evil}]], "method": evil}
    draft.manifest["source"] = {"architecture": evil, "files": [{"name": evil, "sha256": evil}, evil], evil: [evil]}
    draft.manifest["environment"] = {evil: {evil: evil}}
    draft.manifest["modules"][f"layers.0.{evil}"] = draft.manifest["modules"].pop("layers.0.attn.k")
    for key in ("values", "bitmap", "row_offsets"):
        dtype, shape, _ = draft.tensors[f"layers.0.attn.k.{key}"]
        draft.put(f"layers.0.{evil}.{key}", draft.array(f"layers.0.attn.k.{key}"), dtype=dtype, shape=shape)
        draft.drop(f"layers.0.attn.k.{key}")
    file = SalrFile(draft.write(tmp_path / "a <i>&b.salr"))
    results = evaluation(result(f"{evil}x", architecture=evil, is_reference=True), result("a <i>&b.salr"))
    results.protocol.update(text=evil, window=evil, device=evil)
    page = Page(report_page(file, results))
    assert "script" not in page.tags and page.of("h1") == ["a <i>&b.salr"]
    assert any(evil in text for text in page.of("td")) and any(evil in text for text in page.of("title"))
    assert not any("alert" in (value or "") or "alert" in name for name, value in page.attributes)


def test_writing_replaces_the_old_page_and_leaves_nothing_else(packed, tmp_path):
    (tmp_path / "page.html").write_text("old")
    write_report(SalrFile(packed), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == report_page(SalrFile(packed))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_damaged_module_is_an_error_and_no_page(packed, tmp_path):
    data = bytearray(packed.read_bytes())
    data[SalrFile(packed).tensors["salr.manifest"].begin + 5] ^= 1
    (tmp_path / "bad.salr").write_bytes(data)
    with pytest.raises(SalrError, match="digest"):
        write_report(SalrFile(tmp_path / "bad.salr"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_output_error_has_a_map_of_its_own_where_it_was_measured(packed, open_draft, tmp_path):
    without = report_page(SalrFile(packed))
    draft = open_draft(packed)
    for number, module in enumerate(draft.manifest["modules"].values()):
        module["error"]["output"] = 0.01 * (number + 1)
    page = report_page(SalrFile(draft.write(tmp_path / "f.salr")))
    assert "Output on calibration data" in page and "median output error 7.5 %" in page
    assert "Output on calibration data" not in without and "output error" not in without


def test_singular_values_are_those_of_the_product():
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 40), (30, 5)))
    np.testing.assert_allclose(singular_values(a, b), np.linalg.svd(b @ a, compute_uv=False)[:5], rtol=1e-4)


def test_the_decay_is_that_of_the_stored_residuals_without_the_trained_adapter(reader_salr):
    file = SalrFile(reader_salr)
    (found,) = (d for d in residual_decay(file, module_rows(file)) if d.kind == "self_attn.q_proj")
    shares = []
    for layer in range(2):
        product = file.adapters(f"model.layers.{layer}.self_attn.q_proj", ["residual"]).product()
        values = np.linalg.svd(product, compute_uv=False)[:8]
        shares.append(values / values[0])
    np.testing.assert_allclose(found.median, np.median(shares, axis=0), rtol=1e-3)
    assert found.median[0] == 1 and found.n_modules == 2 and 1 <= found.half_energy <= 8


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("layers.12.mlp.experts.7.w1", 12, "mlp.experts.w1"),
        ("h.0", 0, "weight"),
        ("0.dense", 0, "dense"),
        ("head", None, "head"),
        ("block2.proj", None, "block2.proj"),
    ],
)
def test_a_name_is_split_into_layer_and_kind(module, layer, kind):
    assert split_name(module) == (layer, kind)


def test_kinds_come_in_the_order_of_a_block_with_short_but_distinct_labels(reader_salr):
    found = kinds(module_rows(SalrFile(reader_salr)))
    assert list(kind_labels(found).values()) == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert kind_labels(["attn.c_proj", "mlp.c_proj", "c_fc"]) == {
        "attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj", "c_fc": "c_fc",
    }  # fmt: skip


def test_experts_share_a_cell_weighted_by_energy(moe, tmp_path):
    salr.convert(moe, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude"))
    rows = module_rows(SalrFile(tmp_path / "m.salr"))
    (kind,) = {row.kind for row in rows if row.kind.endswith("w1")}
    cells = cells_of(rows, lambda row: row.entry.error.mask)
    errors = [row.entry.error for row in rows if row.kind == kind and row.layer == 1]
    expected = sum(e.mask * e.energy for e in errors) / sum(e.energy for e in errors)
    assert len(errors) == 4 and cells[kind, 1] == pytest.approx(expected)
    assert {key for key in cells if key[0] == kind} == {(kind, 0), (kind, 1)}


def test_module_rows_add_up_to_the_packed_bytes(reader_salr):
    file = SalrFile(reader_salr)
    rows, sizes, numbers = module_rows(file), size_report(file), headline(file)
    assert sum(row.n_bytes for row in rows) == sizes.packed_bytes == numbers.packed_bytes
    assert (numbers.n_modules, numbers.ranks, numbers.error_output) == (14, (8, 8), None)
    assert numbers.sparsity == pytest.approx(0.5) and numbers.source_bits_per_weight == 16


def test_adapter_rows_count_modules_ranks_and_bytes(reader_salr):
    residual, style = adapter_rows(SalrFile(reader_salr))
    sizes = size_report(SalrFile(reader_salr))
    assert (residual.name, residual.trained, residual.n_modules, residual.n_bytes) == (
        "residual", False, 14, sizes.residual_bytes,
    )  # fmt: skip
    assert (style.name, style.trained, style.n_modules, style.ranks, style.scalings, style.n_bytes) == (
        "style", True, 4, (4, 4), (1.5,), sizes.adapter_bytes,
    )  # fmt: skip


def test_bars_stand_on_one_scale_and_name_parts_only_where_the_name_fits():
    text = stacked_bars([("before", [Part("wide", "values", 1000)]), ("after", [Part("narrow", "kept", 10)])])
    widths = [float(width) for width in re.findall(r'<rect x="0"[^>]* width="([\d.]+)"', text)]
    assert widths[0] == pytest.approx(100 * (widths[1] + 1.5), rel=0.02)
    assert text.count(">wide<") == 1 and ">narrow<" not in text and "<title>narrow: 0.0 kB</title>" in text


def test_colours_rise_with_the_value():
    cells = {("q", 0): 0.0, ("q", 1): 0.05, ("q", 2): 0.1}
    page = heat_map("t", cells, ["q"], {"q": "q"}, [0, 1, 2, 3], 0.1)
    drawn = re.findall(r'class="(h\d+)" rx', page)
    assert drawn == ["h0", "h6", "h11"] and "5.0 %" in page


def test_markup_escapes_children_and_attributes_but_not_itself():
    assert tag("p", "<&", tag("b", 1.50, class_='"x"')) == '<p>&lt;&amp;<b class="&quot;x&quot;">1.5</b></p>'
    assert together(["<", None, Markup("<hr>")]) == "&lt;<hr>" and tag("meta", name="a", b_c=None) == '<meta name="a">'


@pytest.mark.parametrize(("n", "text"), [(0, "0.0 kB"), (1234, "1.2 kB"), (5_600_000, "5.6 MB"), (7.891e9, "7.89 GB")])
def test_sizes_carry_their_unit(n, text):
    assert size_text(n) == text
