"""kshot bench serve: it measures a server of its own, and what it says adds up."""

from pathlib import Path

from experiments.bench import serve


def test_the_times_are_those_of_a_server(tmp_path: Path) -> None:
    with serve.server(tmp_path) as address:
        rows, ratios = serve.one_by_one(address, 2)
        more, together = serve.together(address, 2)
    assert len({row["name"] for row in rows}) == len(rows)
    medians = {row["name"]: row["median"] for row in rows}
    spent = {row["name"]: (row["median"], row["engine_ms"]) for row in rows if "engine_ms" in row}
    assert len(spent) == 4
    assert all(whole > 0 and engine >= 0 for whole, engine in spent.values())
    assert spent[f"forward_backward of {serve.BATCH}"][1] > 0
    assert ratios["overhead_ms"] == max(value for name, value in medians.items() if "beyond" in name)
    assert 0 < more[0]["engine_s"] < more[0]["median"]
    assert 0 < together["engine_share"] < 1
