"""Bad records and media are counted, named and worth nothing; long ones are cut, none is lost."""

import dataclasses
import multiprocessing

import pytest
from feeding import MEDIA_TOKENS, NUM_FRAMES, record, segments, write

from vllama2_jax.data.examples import Subset
from vllama2_jax.data.pipeline import TooManyFaults
from vllama2_jax.data.records import Media, Record


@pytest.fixture(scope="module")
def damaged(setting):
    """A mixture with a broken video, a missing file, and a record without its placeholder."""
    records = [record(f"image-{i}", "image", f"{i}.png", dataset="bad") for i in range(5)]
    records.insert(1, record("broken", "video", "broken.mp4", dataset="bad"))
    records.insert(3, record("missing", "video", "nowhere.mp4", dataset="bad"))
    records.append({"id": "mute", "conversations": []})
    source = write(setting.folder / "damaged.json", records)
    return dataclasses.replace(setting, sources=(source,))


def test_bad_records_are_counted_and_named_and_teach_nothing(damaged):
    feed = damaged.feed()
    batches = list(feed.batches())
    assert {fault.record: fault.dataset for fault in feed.faults.values()} == {
        "broken": "bad",
        "missing": "bad",
        "mute": "",
    }
    reasons = {fault.record: fault.reason for fault in feed.faults.values()}
    assert "broken.mp4" in reasons["broken"] and "nowhere.mp4" in reasons["missing"]
    assert "damaged.json, record 7 (id mute)" in reasons["mute"]
    # Twice, once per epoch.
    assert sum(len(batch.faults) for batch in batches) == 6
    for id, segment, row in segments(batches):
        assert (segment["target_weights"].sum() == 0) == (not id.startswith("image"))
        if id in ("broken", "missing"):
            clip = segment["media_index"].max() // MEDIA_TOKENS
            assert not row["clip_mask"][clip]
    met = [id for batch in batches for row in batch.records for id in row]
    assert sorted(met) == sorted(2 * [f"image-{i}" for i in range(5)] + 2 * [*reasons])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_records_stop_the_run_and_are_named(damaged, workers):
    with pytest.raises(TooManyFaults, match=r"3 records cannot be read, 2 are allowed: ") as error:
        list(damaged.feed(max_faults=2, workers=workers).batches())
    for name in ("broken.mp4", "nowhere.mp4", "mute"):
        assert name in str(error.value)
    assert multiprocessing.active_children() == []
    assert len(list(damaged.feed(max_faults=3).batches())) > 0


def test_what_is_in_quarantine_can_be_left_out(damaged):
    kept = Subset(damaged.sources[0], [0, 2, 4, 5, 6])
    feed = dataclasses.replace(damaged, sources=(kept,)).feed()
    batches = list(feed.batches())
    assert not feed.faults
    ids = [id for batch in batches for row in batch.records for id in row]
    assert sorted(ids) == sorted(2 * [f"image-{i}" for i in range(5)])


def test_a_long_record_is_cut_and_one_that_would_lose_its_answers_is_a_fault(setting):
    long = record("long", "image", "1.png", answer="Red. " * 200)
    lost = record("lost", "image", "1.png")
    lost["conversations"][0]["value"] = "<image>\n" + "red " * 300
    source = write(setting.folder / "long.json", [long, lost, record("short")])
    feed = dataclasses.replace(setting, sources=(source,)).feed(packing=False, epochs=1)
    batches = list(feed.batches())
    assert [fault.record for fault in feed.faults.values()] == ["lost"]
    assert "every supervised token" in next(iter(feed.faults.values())).reason
    made = {id: segment for id, segment, _ in segments(batches)}
    # 120 ids, of which the placeholder takes MEDIA_TOKENS slots.
    assert len(made["long"]["tokens"]) == 120 - 1 + MEDIA_TOKENS
    assert made["long"]["target_weights"].sum() > 50


def test_a_list_of_frames_is_used_as_it_is_and_must_not_be_longer_than_a_clip(setting):
    lists = {"four": [0, 2, 2, 5], "two": [1, 3], "five": [0, 1, 2, 3, 4]}
    records = [
        record(name, "video", [f"{i}.png" for i in numbers]) for name, numbers in lists.items()
    ]
    source = write(setting.folder / "frames.json", records)
    feed = dataclasses.replace(setting, sources=(source,)).feed(epochs=1)
    batches = list(feed.batches())
    (fault,) = feed.faults.values()
    assert fault.record == "five"
    assert "0.png: gives 5 time steps, the model takes 4; " in fault.reason
    for id, segment, row in segments(batches):
        if id == "five":
            continue
        shown = row["frames"][row["clip_frames"][segment["media_index"].max() // MEDIA_TOKENS]]
        # What a short list lacks is black.
        wanted = [20 * number for number in lists[id]] + [0] * (NUM_FRAMES - len(lists[id]))
        assert shown[:, 8, 8, 0].tolist() == wanted


@pytest.mark.parametrize("style", ["sft", "plain"])
def test_a_record_takes_the_slots_that_were_planned(setting, style):
    form = setting.format(style=style, max_tokens=60)
    cut = 0
    for words in (1, 10, 40, 90, 200):
        for media in (Media("image", "1.png"), None):
            if style == "plain" and media is None:
                continue
            record = Record(
                "a", (("<image>\nWhat?" if media else "What?", "Red. " * words),), media
            )
            text_tokens, clips = form.text_tokens(record), int(media is not None)
            made = form.supervised(record)
            assert form.slots([text_tokens], [clips]).tolist() == [len(made.tokens)]
            cut += text_tokens > 60
    assert cut > 1


def test_media_and_placeholders_must_pair_up(setting):
    form, image = setting.format(), Media("image", "1.png")
    for question in ("What?", "<image>\n<video>\nWhat?"):
        with pytest.raises(ValueError, match=r"media placeholder\(s\).* media for 1"):
            form.supervised(Record("a", ((question, "Red."),), image))
    with pytest.raises(ValueError, match="media for 0"):
        form.supervised(Record("a", (("<image>\nWhat?", "Red."),)))
    with pytest.raises(ValueError, match="must alternate"):
        form.text_tokens(Record("a", ()))


def test_rows_too_short_for_media_and_text_are_refused(setting):
    form = setting.format(max_length=6)
    form.check_room(0, 0)
    with pytest.raises(ValueError, match="rows of 6 slots leave no room for text beside a clip of"):
        form.check_room(1, 0)
    with pytest.raises(ValueError, match=r"beside a clip of \d+ and a sound of 5; rai"):
        setting.format(max_length=9, sound_tokens=5).check_room(1, 1)


def test_an_unknown_style_is_refused(setting):
    with pytest.raises(ValueError, match="unknown style 'chat'; known: sft, plain"):
        setting.format(style="chat")
