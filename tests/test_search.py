"""The search: spaces, scores against written-out ones, evolution, and going on."""

import json
from random import Random

import pytest
import timm
import torch
import yaml

from timm_qkformer.analysis.hooks import inference, recalibrated_norms, record_spikes
from timm_qkformer.cli import main
from timm_qkformer.reproduction.comparison import run_comparison
from timm_qkformer.search import SPACES, Evolution, SearchState, evolve, score_model
from timm_qkformer.search import run as run_module
from timm_qkformer.search.evolution import VAIN_TRIES, Candidate, pareto_front
from timm_qkformer.search.ranking import rank
from timm_qkformer.search.run import SearchSettings, build, search
from timm_qkformer.search.spaces import Gene, Space

TINY = Space(
    "test_autost",
    {
        "depth": Gene((1, 2, 3), 0.4),
        "mlp_ratio": Gene((1, 2, 3), 0.2, "depth"),
        "num_heads": Gene((2, 4), 0.2, "depth"),
        "embed_dim": Gene((16, 24, 32), 0.4),
    },
    lambda genome: dict(genome),
    "autost_cifar10",
    (3e3, 6e4),
)


@pytest.fixture
def tiny_space(monkeypatch):
    monkeypatch.setitem(SPACES, "tiny", TINY)
    return "tiny"


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_space_gives_models_within_its_parameters(name):
    space, random = SPACES[name], Random(1)
    settings = SearchSettings(space=name)
    sizes = []
    for _ in range(4):
        genome = space.sample(random)
        child = space.cross(space.mutate(genome, random), space.sample(random), random)
        for each in (genome, child):
            assert all(
                len(each[g]) == (each[gene.count] if isinstance(gene.count, str) else gene.count)
                for g, gene in space.genes.items()
                if gene.count is not None
            )
            model = build(space, each, settings, "meta")
            sizes.append(sum(p.numel() for p in model.parameters()))
    assert min(sizes) < space.params[1]
    assert max(sizes) > space.params[0]


def test_mutations_keep_what_they_do_not_change():
    random, genome = Random(0), {"depth": 3, "mlp_ratio": [1, 2, 3], "num_heads": [2, 4, 2], "embed_dim": 16}
    mutants = [TINY.mutate(genome, random) for _ in range(300)]
    same_depth = [m for m in mutants if m["depth"] == 3]
    assert 0.65 < len(same_depth) / 300 < 0.82  # 0.6 kept, and a third of the others drawn anew
    kept = sum(m["mlp_ratio"][i] == genome["mlp_ratio"][i] for m in mutants for i in range(m["depth"]))
    assert 0.82 < kept / sum(m["depth"] for m in mutants) < 0.92  # 0.8 kept, and a third of the others
    one, other = {**genome, "embed_dim": 32}, {"depth": 1, "mlp_ratio": [2], "num_heads": [4], "embed_dim": 24}
    for _ in range(20):
        child = TINY.cross(one, other, random)
        assert child["embed_dim"] in (24, 32)
        assert child["mlp_ratio"][1:] == ([2, 3] if child["depth"] == 3 else [])


def brute_force(model, x, relative):
    """log |K|, pair of samples by pair, layer by layer."""
    with recalibrated_norms(model, [x]), inference(model), record_spikes(model) as spikes:
        model(x)
    K = torch.zeros(len(x), len(x), dtype=torch.float64)
    for fired in spikes.values():
        codes = fired.transpose(0, 1).flatten(1).bool()
        rate = codes.double().mean()
        for i in range(len(x)):
            for j in range(len(x)):
                apart = (codes[i] != codes[j]).sum().double()
                if relative and 0 < rate < 1:
                    apart = apart / (4 * rate * (1 - rate))
                K[i, j] += codes.shape[1] - apart
    return torch.linalg.slogdet(K)[1].item()


def test_scores_are_what_they_say():
    torch.manual_seed(0)
    model = timm.create_model("test_autost", num_classes=5, time_steps=2)
    x = torch.randn(4, 3, 16, 16)
    for score in ("naswot", "spikes"):
        assert score_model(model, x, score) == pytest.approx(brute_force(model, x, score == "spikes"), rel=1e-6)
    # Convolutions by hand, stride 4: 16 x 16 pixels, then 8 x 8, 4 x 4; attention with 16 tokens.
    width, pixels = 32, 256
    stem = 9 * pixels * (3 * width // 8 + (width // 8) * (width // 4) + (width // 4) * (width // 2))
    stem += 9 * pixels // 4 * (width // 2) * width + 9 * 16 * width * width
    blocks = 0
    for heads, ratio in ((4, 2), (8, 3)):
        blocks += 16 * (4 * width * width + 2 * ratio * width * width + 2 * width * (width // heads))
    expected = (stem + blocks + 5 * width) / 1e9
    assert score_model(model, x, "flops") == pytest.approx(expected, rel=1e-9)
    assert model.time_steps == 2
    weighted = score_model(model, x, "flops", pattern_weight=2.0)
    assert weighted == pytest.approx(expected + 2.0 / score_model(model, x, "naswot"))
    for args in ({"score": "luck"}, {"score": "spikes", "pattern_weight": 1.0}):
        with pytest.raises(ValueError, match=r"score='luck' is unknown|pattern_weight=1.0 belongs"):
            score_model(model, x, **args)
    with pytest.raises(ValueError, match="1 samples"):
        score_model(model, x[:1], "spikes")


def run(settings, state=None, calls=None):
    def params(genome):
        return 1000 * genome["depth"] * genome["embed_dim"]

    def score(genome):
        if calls is not None:
            calls.append(genome)
        return genome["embed_dim"] + sum(genome["mlp_ratio"])

    return evolve(TINY, (2e4, 1e5), params, score, settings, state)


def test_evolution_is_seeded_and_improves_and_never_looks_twice():
    settings = Evolution(population=12, rounds=5, keep=3, crossovers=5, mutations=5, seed=2)
    found = run(settings)
    assert found == run(settings)
    assert found != run(Evolution(12, 5, 3, 5, 5, seed=4))
    keys = [json.dumps(c.genome, sort_keys=True) for c in found]
    assert len(set(keys)) == len(keys)
    assert all(2e4 <= c.params <= 1e5 for c in found)
    best = [max(c.score for c in found if c.round <= r) for r in range(6)]
    assert best[-1] == 32 + 9  # the best that there is
    assert sum(c.round == 0 for c in found) == 12
    with pytest.raises(ValueError, match=r"params=1 to 2: .* have 16,000 to"):
        evolve(TINY, (1, 2), lambda g: 1000 * g["depth"] * g["embed_dim"], lambda g: 0.0, settings)


def test_an_interrupted_search_goes_on_where_it_was():
    settings, state, calls = Evolution(10, 4, 3, 4, 4), SearchState(), []
    whole = run(settings)

    class StopError(Exception):
        pass

    def stop(candidate):
        if candidate.round == 2:
            raise StopError

    with pytest.raises(StopError):
        evolve(
            TINY,
            (2e4, 1e5),
            lambda g: 1000 * g["depth"] * g["embed_dim"],
            lambda g: g["embed_dim"] + sum(g["mlp_ratio"]),
            settings,
            state,
            stop,
        )
    known = len(state.scores)
    assert run(settings, state, calls) == whole
    assert len(calls) == len(whole) - known


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": -5},
        {"batch": 1},
        {"batch": -1},
        {"num_classes": -1},
        {"time_steps": 0},
        {"pattern_weight": 1e400},
    ],
    ids=str,
)
def test_settings_that_no_search_can_have(settings):
    (name, _) = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        SearchSettings(**settings)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '[{"a": 1}]', "7", "{}", '{"settings": {}}',
                '{"settings": 1, "params": {}, "scores": []}', '{"settings": {}, "params": {"a": "b"}, "scores": {}}',
                '{"stated": {}, "networks": [1]}', "[" * 100_000]
)  # fmt: skip
@pytest.mark.parametrize(
    ("file", "what", "read"),
    [
        ("search.json", "state of a search", lambda folder: search(SearchSettings(), folder)),
        ("ranking.json", "ranking", lambda folder: rank(SearchSettings(), folder, 2, 1)),
        ("comparison.json", "comparison", lambda folder: run_comparison("cifar10", folder, folder)),
    ],
)
def test_a_folder_with_another_state_is_named(content, file, what, read, tmp_path):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file} is no {what} \(.*\): choose another folder"):
        read(tmp_path)
    assert (tmp_path / file).read_text() == content


def test_a_folder_of_other_settings_says_which(tiny_space, tmp_path):
    search(SearchSettings(tiny_space, image_size=16, evolution=Evolution(2, 0, 1, 1, 1)), tmp_path, progress=False)
    other = SearchSettings(tiny_space, image_size=32, evolution=Evolution(2, 0, 1, 1, 1, seed=5))
    with pytest.raises(ValueError, match=r"search\.json is of a search with other settings \(seed, image_size\)"):
        search(other, tmp_path)


def test_what_takes_long_is_kept_soon(tiny_space, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_SAVE_EVERY", 0.0)
    scored = []

    def score(*args):
        if len(scored) == 2:
            kept = json.loads((tmp_path / "search.json").read_text())
            assert len(kept["scores"]) == 2
            raise KeyboardInterrupt
        scored.append(args)
        return 1.0

    monkeypatch.setattr(run_module, "score_model", score)
    with pytest.raises(KeyboardInterrupt):
        search(SearchSettings(tiny_space, evolution=Evolution(4, 0, 1, 0, 0)), tmp_path, progress=False)
    assert len(scored) == 2


def test_sizes_that_no_network_has_are_told_soon(tiny_space, tmp_path):
    drawn = []

    def params(genome):
        drawn.append(genome)
        return 5

    with pytest.raises(ValueError, match="networks of the space were drawn"):
        evolve(SPACES["autost-small"], (1, 2), params, lambda genome: 0.0, Evolution())
    assert len(drawn) <= VAIN_TRIES
    with pytest.raises(ValueError, match="params=1 to 2: 0 networks of tiny found, not 3"):
        rank(SearchSettings(tiny_space, params=(1, 2)), tmp_path, 3, 1)


def test_a_search_that_never_began_leaves_no_state(tiny_space, tmp_path):
    with pytest.raises(ValueError, match="time_steps"):
        search(SearchSettings(tiny_space, time_steps=999_999), tmp_path, progress=False)
    assert not (tmp_path / "search.json").exists()


def test_pareto_front():
    candidates = [Candidate({}, p, s, 0) for p, s in ((5, 1.0), (1, 1.0), (2, 3.0), (3, 2.0), (4, 4.0), (1, 0.5))]
    assert [(c.params, c.score) for c in pareto_front(candidates, lambda c: c.params)] == [(1, 1.0), (2, 3.0), (4, 4.0)]


def test_command(tiny_space, tmp_path, capsys):
    argv = [
        "search",
        "--space",
        "tiny",
        "--score",
        "spikes",
        "--params",
        "3e3",
        "6e4",
        "--population",
        "4",
        "--rounds",
        "1",
        "--keep",
        "2",
        "--crossovers",
        "1",
        "--mutations",
        "1",
        "--image-size",
        "16",
        "--batch",
        "4",
        "--time-steps",
        "2",
        "--no-progress",
        "--output",
        str(tmp_path),
    ]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "M parameters" in table
    assert {path.name for path in tmp_path.iterdir()} >= {
        "search.json",
        "candidates.csv",
        "pareto.png",
        "winner_01.yaml",
    }
    recipe = yaml.safe_load((tmp_path / "winner_01.yaml").read_text())
    model = timm.create_model(recipe["model"], num_classes=recipe["num_classes"], **recipe["model_kwargs"])
    assert model.time_steps == 2
    lines = (tmp_path / "candidates.csv").read_text().splitlines()
    assert len(lines) == 9
    assert sum(p.numel() for p in model.parameters()) == int(lines[1].split(",")[1])
    before = (tmp_path / "search.json").read_text()
    assert main(argv) == 0
    assert (tmp_path / "search.json").read_text() == before
    assert capsys.readouterr().out == table
    assert main([*argv, "--seed", "5"]) == 2
    assert "is of a search with other settings (seed)" in capsys.readouterr().err
    assert main(["search", "--space", "nowhere", "--output", str(tmp_path)]) == 2
    assert "space='nowhere' is unknown" in capsys.readouterr().err
    assert main([*argv, "--epochs", "2"]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_json_is_all_that_search_prints(tiny_space, tmp_path, capsys):
    small = ["--population", "2", "--rounds", "0", "--keep", "2", "--crossovers", "0", "--mutations", "0"]
    small += ["--image-size", "16", "--batch", "2"]
    line = ["search", "--space", tiny_space, "--output", str(tmp_path / "found"), "--time-steps", "1", *small, "--json"]
    assert main(line) == 0
    winners = json.loads(capsys.readouterr().out)
    assert {"genome", "params", "score"} <= set(winners[0]["candidate"])
    assert main([*line, str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text()) == winners
    assert "wrote" in capsys.readouterr().out
    assert main([*line, str(tmp_path / "found.json")]) == 2  # nothing is overwritten


def test_winners_come_with_what_they_cost(tiny_space, tmp_path):
    settings = SearchSettings(
        "tiny", "flops", (3e3, 6e4), Evolution(3, 0, 2, 0, 0), image_size=16, batch=2, time_steps=1
    )
    winners = search(settings, tmp_path, progress=False)
    assert all(winner.picojoules > 0 for winner in winners)
    assert len(list(tmp_path.glob("winner_*.yaml"))) == len(winners)
    assert winners[0].candidate.score == max(winner.candidate.score for winner in winners)
