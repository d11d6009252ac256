"""`vllama2 plan`: what it prints, and its exit code."""

import json

import pytest
from flax.traverse_util import flatten_dict

from vllama2_jax.cli import main
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import model_config

# As users' scripts read them.
KEYS = {"fits", "chips", "compile_seconds", "hbm_bytes_per_chip", "model_flops_per_step"}
KEYS |= {"hardware_flops_per_step", "collectives", "hlo", "roofline", "stage", "useful_fraction"}
KEYS |= {"parameters", "assumptions", "published"}
TINY_MODEL = model_config("tiny")
TINY = ("plan", "--config=config:tiny_video_sft", "--model", "tiny")


def planned(capsys, *arguments) -> tuple[int, dict]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_of_a_step_on_a_slice_has_every_part(libtpu, capsys, tmp_path):
    hlo = tmp_path / "step.txt"
    code, found = planned(
        capsys, *TINY, "--topology", "v5e:2x2", "--steps", "100", "--save-hlo", str(hlo)
    )
    assert code == 0 and found["fits"] is True and found["chips"] == 4
    assert KEYS <= set(found)
    memory = found["hbm_bytes_per_chip"]
    assert set(memory) == {"arguments", "temporaries", "peak", "limit"}
    assert memory["peak"] == memory["arguments"] + memory["temporaries"] < memory["limit"]
    assert found["hardware_flops_per_step"] >= found["model_flops_per_step"] > 0
    for sent in found["collectives"]:
        assert {"kind", "axis", "bytes", "count"} <= set(sent)
        assert sent["axis"] == "fsdp" and sent["bytes"] > 0
    assert {"all-gather", "reduce-scatter"} & {sent["kind"] for sent in found["collectives"]}
    roof = found["roofline"]
    assert roof["step_seconds"] >= roof["compute_seconds"] > 0
    peak = 4 * 197e12
    assert roof["utilisation"] == pytest.approx(
        found["model_flops_per_step"] / (roof["step_seconds"] * peak)
    )
    stage = found["stage"]
    assert stage["steps"] == 100 and stage["samples"] == 100 * found["batch"]["rows"]
    assert stage["hours"] == pytest.approx(100 * roof["step_seconds"] / 3600)
    assert stage["chip_hours"] == pytest.approx(4 * stage["hours"])
    assert found["hlo"] == str(hlo) and hlo.read_text().startswith("HloModule")
    # Pictures are learnt from, with their tower frozen; what hears does not take part.
    leaves = flatten_dict(abstract_params(TINY_MODEL), sep="/").items()
    frozen = sum(leaf.size for path, leaf in leaves if path.startswith(("vision", "audio")))
    everything = sum(leaf.size for _, leaf in leaves)
    assert found["parameters"] == {"total": everything, "trainable": everything - frozen}
    assert any("causal attention halved" in sentence for sentence in found["assumptions"])
    measured = {row["name"]: row["measured"] for row in found["published"]}
    assert measured["Llama2-70B"] == 0.654


def test_tensor_parallelism_is_planned_by_its_own_axis(libtpu, capsys):
    mesh = ("--mesh", "fsdp+tensor:tensor=2,fsdp=2")
    code, found = planned(capsys, *TINY, "--topology", "v5e:2x2", "--steps", "10", *mesh)
    sent = {(one["kind"], one["axis"]) for one in found["collectives"]}
    assert code == 0 and {("all-reduce", "tensor"), ("all-gather", "fsdp")} <= sent


def test_what_does_not_fit_ends_with_1_and_the_compilers_word(libtpu, capsys):
    code, found = planned(
        capsys, "plan", "--config=config:decoder_only", "--batch", "64", "--topology", "v5e:4x4"
    )
    assert code == 1 and found["fits"] is False
    assert "exceeds available HBM" in found["refusal"]
    assert found["hbm_bytes_per_chip"]["arguments"] > 17e9 and not found["collectives"]


def test_without_a_gpu_formulas_answer_and_say_so(capsys):
    code, found = planned(capsys, "plan", "--config=config:video_sft", "--topology", "h100:8x4")
    assert code == 0 and found["estimated"] is True and found["compile_seconds"] is None
    assert main(["plan", "--config=config:video_sft", "--topology", "h100:8x4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "everything here is estimated by formulas" in text
    assert "Nothing was compiled." in text
    assert "causal attention halved" in text and "beside MaxText's measured utilisation" in text


def test_a_search_shows_plans_best_first(capsys):
    code, found = planned(
        capsys, "plan", "--config=config:video_sft", "--topology", "h100:8", "--search"
    )
    fits = [plan["fits"] for plan in found["plans"]]
    assert code == 0 and fits == sorted(fits, reverse=True) and len(set(fits)) == 2
    speeds = [plan["tokens_per_second"] for plan in found["plans"] if plan["fits"]]
    assert len(speeds) > 10 and speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "v9:4x4"), "unknown topology 'v9:4x4'; known: "),
        (("--topology", "h100:8", "--mesh", "fsdp+tensor:tensor=3,fsdp=-1"), "does not fit 8"),
        (("--topology", "h100:8", "--batch", "12"), "make --batch a multiple of them"),
        (("--topology", "h100:8", "--search", "0"), "--search 0 must be at least 1"),
        (("--topology", "h100:8", "--search", "--save-hlo", "x"), "--save-hlo keeps the one"),
        (("--topology", "h100:8", "--save-hlo", "x"), "nothing can be compiled for h100:8 here"),
        (("--topology", "h100:8", "--save-hlo", "/nowhere/x"), "no such folder"),
        (("--topology", "v5p:4x4x6", "--estimate"), "no such slice of v5p can be had"),
        (("--topology", "h100:8", "--mesh", "tensor=4,fsdp=-1"), "splits nothing over tensor"),
        (("--topology", "2xv5p-128", "--estimate"), "as in --mesh dcn_data=2"),
        (("--topology", "v5p:4x4x12", "--batch", "192", "--estimate"), "--mesh data=3,fsdp=64"),
        (("--topology", "h100:8", "--model", "tiny", "--data", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, arguments, words):
    assert main(["plan", "--config=config:video_sft", *arguments]) != 0
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_records_say_how_many_steps_a_run_takes_and_how_full_its_rows_are(capsys, tmp_path):
    words = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A ball."}]
    records = [{"id": str(number), "conversations": words} for number in range(16)]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    arguments = ["plan", "--config=config:tiny_video_sft", "--model", "tiny", "--estimate"]
    arguments += ["--topology", "h100:8", "--batch", "8", "--data", str(file)]
    arguments += ["--config=set:epochs=3", "--config=set:steps=None"]
    code, found = planned(capsys, *arguments)
    assert code == 0
    stage = found["stage"]
    assert stage["samples"] == pytest.approx(48, abs=8) and 1 <= stage["steps"] <= 6
    assert 0 < found["useful_fraction"] < 1
    # All rows are alike, so that the share of a row is the share of all.
    assert main([*arguments]) == 0
    assert f"{found['useful_fraction']:.0%} of the slots" in capsys.readouterr().out
