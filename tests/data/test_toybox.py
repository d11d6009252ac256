"""Toybox: reproducible, balanced, split by attribute pairs, and without cues where none may be."""

import collections
import hashlib
import json

import av
import jsonschema
import numpy as np
import pytest

from vllama2_jax.data.records import read_records
from vllama2_jax.data.toybox.drawing import render
from vllama2_jax.data.toybox.families import FAMILIES, sample_scene
from vllama2_jax.data.toybox.files import golden_clip, toybox_scenes, video_frames, write_toybox
from vllama2_jax.data.toybox.questions import (
    CHANCE,
    KINDS,
    ask_about,
    describe,
)
from vllama2_jax.data.toybox.scenes import (
    COLOURS,
    DIRECTIONS,
    HOLD,
    MOMENTS,
    PAIRS,
    REGISTERS,
    SHAPES,
)
from vllama2_jax.data.toybox.sights import direction_path

_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["id", "kind", "conversations"],
        "anyOf": [{"required": ["video"]}, {"required": ["audio"]}],
        "properties": {
            "id": {"type": "string"},
            "video": {"type": "string", "pattern": r"\.mp4$"},
            # Beside a video it is the video's own track.
            "audio": {"anyOf": [{"type": "string", "pattern": r"\.wav$"}, {"const": True}]},
            "kind": {"enum": list(KINDS)},
            "conversations": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "prefixItems": [
                    {
                        "properties": {
                            "from": {"const": "human"},
                            "value": {"pattern": r"^<(video|audio)>\n\S"},
                        }
                    },
                    {"properties": {"from": {"const": "gpt"}, "value": {"pattern": r"^[a-z ]+$"}}},
                ],
            },
        },
    },
}


@pytest.fixture(scope="module")
def toybox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toybox") / "new"
    calls = []
    write_toybox(folder, 24, seed=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 36) for i in range(36)]
    return folder


def _digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_same_seed_writes_the_same_files_and_another_seed_others(toybox, tmp_path):
    write_toybox(tmp_path / "again", 24, seed=3)
    write_toybox(tmp_path / "other", 24, seed=4)
    assert _digests(tmp_path / "again") == _digests(toybox)
    assert _digests(tmp_path / "other") != _digests(toybox)


def test_json_fits_the_schema_and_every_file_exists(toybox):
    for split in ("train", "heldout"):
        data = json.loads((toybox / f"{split}.json").read_text())
        jsonschema.validate(data, _SCHEMA)
        assert all((toybox / (r.get("video") or r["audio"])).is_file() for r in data)
        assert len({record["id"] for record in data}) == len(data)
        assert {record["kind"] for record in data} == set(KINDS)
        assert [r.to_json() for r in read_records(toybox / f"{split}.json")] == data


def test_decoded_video_holds_the_rendered_frames(toybox):
    for i, (scene, _) in enumerate(toybox_scenes("train", 24, seed=3)):
        if not scene.moments:
            continue
        with av.open(str(toybox / f"videos/train/{i:05d}.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        wanted = video_frames(scene)
        assert np.shape(decoded) == wanted.shape == (MOMENTS * HOLD, 128, 128, 3)
        error = (np.float64(decoded) - wanted) ** 2
        # Colour is stored at half resolution, which costs most of this at edges.
        assert 10 * np.log10(255**2 / error.mean()) > 28
        # Away from edges nothing is left of other moments.
        flat = wanted.reshape(-1, 3)[np.abs(error).sum(-1).reshape(-1) > 60**2]
        assert len(flat) < 0.02 * wanted[..., 0].size


def test_write_toybox_refuses_a_full_folder_and_too_few_clips(toybox, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        write_toybox(toybox, 24)
    with pytest.raises(ValueError, match="at least 12"):
        write_toybox(tmp_path / "x", 11)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_balanced_in_every_kind(split):
    answers = collections.defaultdict(collections.Counter)
    for _, questions in toybox_scenes(split, len(FAMILIES) * 720, seed=0):
        for question in questions:
            answers[question.kind][question.answer] += 1
    for kind, chance in CHANCE.items():
        if kind in ("order", "sounding"):
            continue
        assert len(answers[kind]) == round(1 / chance)
        assert set(answers[kind].values()) == {round(720 * chance)}


@pytest.mark.parametrize("family", ["order", "sounding"])
def test_questions_that_name_two_things_are_balanced_over_place_and_word(family):
    seen = collections.Counter()
    for scene, (question,) in toybox_scenes("heldout", 720, 0, [family]):
        first_named = question.text.index(question.answer) < max(
            question.text.index(thing.name) for thing in scene.things
        )
        seen[first_named, question.answer == scene.things[0].name] += 1
    assert set(seen.values()) == {180} and len(seen) == 4


def _combination(scene):
    """What of a scene is split between training and held-out clips."""
    things = sorted((thing.colour, thing.shape) for thing in scene.things)
    voices = set()
    if not things:
        for event in scene.events:
            middle = np.sqrt(np.prod(event.pitches))
            register = int(np.abs(np.log(np.asarray(REGISTERS) / max(middle, 1))).argmin())
            voices.add((event.kind, register, event.timbre))
    # Noises differ in their bursts: how many, how long, and how they swell.
    noises = {
        (len(scene.events), e.seconds > 1, np.sign(e.levels[0] - e.levels[1]))
        for e in scene.events
        if e.kind != "tone"
    }
    when = scene.family == "sync" and int(np.argmax([m.things[0].y for m in scene.moments]))
    # Where two are all the answers, what is seen or heard must not give the right one away.
    fact = scene.fact if scene.family not in ("sync", "sounding", "glide", "pitch") else ""
    return scene.family, fact, tuple(things), frozenset(voices), frozenset(noises), when


def test_heldout_combinations_are_never_seen_in_training():
    rng = np.random.default_rng(0)
    seen = {
        split: {
            _combination(sample_scene(rng, split, family))
            for family in FAMILIES
            for _ in range(2000)
        }
        for split in ("train", "heldout")
    }
    assert not seen["train"] & seen["heldout"]
    motions = {split: {c for c in seen[split] if c[0] == "motion"} for split in seen}
    assert len(motions["heldout"]) == 24 and len(motions["train"]) == 120


def test_every_attribute_pair_and_answer_is_seen_in_training():
    # What is new in a held-out clip is the combination, never a colour, shape or name.
    rng = np.random.default_rng(1)
    pairs, facts = set(), set()
    for i in range(6000):
        scene = sample_scene(rng, "train", FAMILIES[i % len(FAMILIES)])
        pairs |= {(thing.colour, thing.shape) for thing in scene.things}
        facts.add((scene.family, scene.fact if scene.family != "sounding" else ""))
    assert pairs == set(PAIRS) and len(PAIRS) == len(COLOURS) * len(SHAPES)
    assert len(facts) == (4 + 1 + 5 + 4 + 3) + (2 + 2 + 5 + 4 + 3) + (2 + 1)


def test_text_about_training_scenes_never_describes_a_heldout_motion():
    rng = np.random.default_rng(2)
    heldout = set()
    for i in range(24):
        heldout.add(describe(sample_scene(rng, "heldout", "motion", i)))
    assert len(heldout) == 24
    assert not heldout & {describe(sample_scene(rng, "train", "motion", i)) for i in range(240)}


def test_direction_scene_has_twins_with_the_same_frames_for_every_other_answer():
    # Which cells are visited depends on the cell left out alone, and every direction leaves out
    # every cell for exactly as many (lanes, start) pairs.
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    tables = []
    for direction in DIRECTIONS:
        sets = collections.Counter()
        for lanes in orders:
            for start in range(9):
                path = direction_path(direction, lanes, start)
                assert len(set(path)) == MOMENTS
                sets[frozenset(path)] += 1
        tables.append(sets)
    assert tables[0] == tables[1] == tables[2] == tables[3]
    assert set(tables[0].values()) == {6} and len(tables[0]) == 9


def test_a_bounce_consists_of_the_same_pictures_whenever_it_is():
    rng = np.random.default_rng(4)
    heights = {}
    for stratum in range(30):
        scene = sample_scene(rng, "train", "bounce", stratum)
        places = sorted(moment.things[0].y for moment in scene.moments)
        heights.setdefault(scene.fact, set()).add(tuple(np.round(places, 6)))
    assert heights["early"] == heights["midway"] == heights["late"] and len(heights["late"]) == 1


def test_direction_is_the_way_of_every_step_but_those_between_lanes():
    rng = np.random.default_rng(1)
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for _ in range(50):
        scene = sample_scene(rng, "train", "motion")
        places = np.array([(m.things[0].x, m.things[0].y) for m in scene.moments])
        steps = np.rint(np.diff(places, axis=0) * 3)
        within = [tuple(step) for step in steps if tuple(step) == ways[scene.fact]]
        # Nine cells in three lanes: two steps between lanes, or three, lie among seven.
        assert len(within) in (5, 4)


def test_order_scene_shows_first_then_second_for_equally_long():
    rng = np.random.default_rng(2)
    for _ in range(100):
        scene = sample_scene(rng, "heldout", "order")
        shown = [m.things[0].name for m in scene.moments if m.things]
        first, second = (thing.name for thing in scene.things)
        half = len(shown) // 2
        assert shown == [first] * half + [second] * half


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_order_scene_is_as_likely_as_its_reverse(split):
    # Both things stay equally long, so the frames of a clip without their order are those of its
    # reverse; what is left is that the pairs must be as likely either way round. Were it not so,
    # the thing that may appear with fewer others would come first more often.
    rng = np.random.default_rng(3)
    drawn = [sample_scene(rng, split, "order", i).things for i in range(12000)]
    partners = collections.defaultdict(set)
    for first, second in drawn:
        partners[first.name].add(second.name)
    assert all(a in partners[b] for a, others in partners.items() for b in others)
    few_first = [
        len(partners[first.name]) < len(partners[second.name])
        for first, second in drawn
        if len(partners[first.name]) != len(partners[second.name])
    ]
    # Held-out things only meet others with as many partners: there, both ways are even by number.
    assert len(few_first) > 2000 if split == "train" else not few_first
    if few_first:
        assert abs(np.mean(few_first) - 0.5) < 4 * 0.5 / len(few_first) ** 0.5


def test_uniform_sampling_sees_each_moment_once():
    # The original's midpoint rule, independently of media/.
    total = MOMENTS * HOLD
    centres = (total - 1) / MOMENTS * (np.arange(MOMENTS) + 0.5)
    assert (np.rint(centres).astype(int) // HOLD).tolist() == list(range(MOMENTS))


def test_rendered_shapes_have_the_areas_of_geometry():
    rng = np.random.default_rng(3)
    areas = {}
    for shape in SHAPES:
        while True:
            scene = sample_scene(rng, "train", "motion")
            if scene.things[0].shape == shape:
                break
        thing, frame = scene.moments[0].things[0], render(scene, 256)[0].astype(float)
        background = np.asarray(scene.moments[0].background, float)
        span = np.asarray(thing.rgb, float) - background
        cover = ((frame - background) @ span) / (span @ span)
        areas[shape] = cover.sum() / (thing.radius * 256) ** 2
    star = 10 * 0.5 * 1.1 * 0.45 * np.sin(np.pi / 5)
    wanted = {
        "circle": np.pi,
        "ring": np.pi * (1 - 0.25),
        "square": (2 * 0.86) ** 2,
        "cross": 4 * 0.34 * 2 - (2 * 0.34) ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * 1.12**2,
        "star": star,
    }
    assert areas == pytest.approx(wanted, rel=0.03)


def test_every_family_describes_itself_with_its_answers():
    rng = np.random.default_rng(4)
    for family in FAMILIES:
        for _ in range(20):
            scene = sample_scene(rng, "train", family)
            for question in ask_about(scene, rng):
                if question.kind not in ("change", "sync"):
                    assert question.answer in describe(scene)


def test_golden_clip_is_a_heldout_scene_with_its_answer():
    frames, question, answer = golden_clip()
    assert frames.shape == (MOMENTS, 128, 128, 3) and frames.dtype == np.uint8
    assert question and answer in DIRECTIONS
