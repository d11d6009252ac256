"""Generation through the public API, on a random miniature."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import vllama2_jax as vl

pytest.importorskip("torch")
from oracle import write_miniature

_FRAMES = np.zeros((4, 32, 32, 3), np.uint8)
QUESTIONS = ["What is shown?", "What happens next in the video, and why?", "Who?"]


@pytest.fixture(scope="module", params=["mistral", "qwen2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tower, connector = (
        ("clip", "stc_connector") if request.param == "mistral" else ("siglip", "stc_connector_v35")
    )
    write_miniature(folder, request.param, tower, connector)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return vl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (4, 40, 52, 3), np.uint8) for _ in range(3)]


def test_a_batch_of_unequal_lengths_equals_one_by_one(model, clips):
    image = clips[0][0]
    pairs = [*zip(clips, QUESTIONS, strict=True), (image, "What is this?"), (None, "Hello?")]
    together = model.ask_batch(pairs, max_new_tokens=12)
    alone = [model.ask(media, question, max_new_tokens=12) for media, question in pairs]
    assert together == alone
    assert len(set(alone)) > 1


def test_a_last_batch_of_fewer_rows_answers_like_the_others(model):
    questions = [f"Question {number}?" for number in range(9)]
    together = model.ask_batch([(None, question) for question in questions], max_new_tokens=4)
    assert together == [model.ask(None, question, max_new_tokens=4) for question in questions]


def test_files_that_occur_again_are_read_once_and_then_let_go(model, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    read, seen = model.read_media, []

    def spy(media, *args, **kwargs):
        seen.append(media)
        return read(media, *args, **kwargs)

    monkeypatch.setattr(model, "read_media", spy)
    model.ask_batch([(path, "Who?"), (None, "Who?"), (path, "Where?")], max_new_tokens=2)
    assert seen == [path, None]


def test_a_length_bucket_compiles_once_whatever_the_answers_limit(folder, clips):
    model = vl.load(folder, dtype="float32")
    for limit in (2, 40, 300):
        model.ask(clips[0], QUESTIONS[0], max_new_tokens=limit)
    programs = model.generator.programs
    assert programs.prefill._cache_size() == programs.start._cache_size() == 1


def test_options_may_be_given_by_position(model, clips):
    asked = model.ask(clips[0], "Who?", "video", None, None, None, 4)
    assert asked == model.ask(clips[0], "Who?", modality="video", max_new_tokens=4)


def test_a_stream_refuses_bad_input_at_once(model):
    with pytest.raises(ValueError, match="nowhere"):
        model.stream("nowhere.mp4", "What?")


def test_a_prompt_beyond_what_the_model_was_made_for_is_said(model, monkeypatch):
    decoder = dataclasses.replace(model.config.decoder, max_positions=8)
    config = dataclasses.replace(model.config, decoder=decoder)
    monkeypatch.setattr(model.generator.programs, "config", config)
    with pytest.warns(UserWarning, match="longer than the 8"):
        model.ask(None, "A question of more than a few words, is it not?", max_new_tokens=1)


def test_sampling_in_a_batch_equals_one_by_one(model, clips):
    options = dict(max_new_tokens=8, temperature=1.0, seed=5)
    pairs = list(zip(clips, QUESTIONS, strict=True))
    assert model.ask_batch(pairs, **options) == [model.ask(*pair, **options) for pair in pairs]


def test_seeds_repeat_and_differ(model, clips):
    def answer(seed):
        return model.ask(clips[0], QUESTIONS[0], max_new_tokens=16, temperature=1.5, seed=seed)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_a_stream_joins_to_the_answer(model, clips):
    pieces = list(model.stream(clips[0], QUESTIONS[1], max_new_tokens=30))
    assert "".join(pieces).strip() == model.ask(clips[0], QUESTIONS[1], max_new_tokens=30)
    assert len(pieces) > 1


def test_generation_goes_on_past_the_first_room(model, clips):
    """More new tokens than the cache first has room for, and not a multiple of it."""
    messages = [{"role": "user", "content": "Go on."}]
    long = model.generate(clips[0], messages, max_new_tokens=300, stop=False)
    short = model.generate(clips[0], messages, max_new_tokens=40, stop=False)
    assert len(long) == 300
    assert long[:40] == short


def test_generation_ends_at_a_stop_id(model, clips):
    messages = [{"role": "user", "content": "Go on."}]
    free = model.generate(clips[0], messages, max_new_tokens=20, stop=False)
    stop = free[7]
    defaults = model.card.generation
    try:
        object.__setattr__(model.card, "generation", type(defaults)(stop_ids=(stop,)))
        ended = model.generate(clips[0], messages, max_new_tokens=20)
    finally:
        object.__setattr__(model.card, "generation", defaults)
    assert ended == free[: free.index(stop) + 1]


def test_a_session_answers_as_a_fresh_conversation_does(model, clips):
    """The kept cache changes no answer: each turn equals the whole conversation fed anew."""
    session = model.session(clips[0])
    for question in QUESTIONS:
        history = [*session.messages, {"role": "user", "content": question}]
        answer = session.ask(question, max_new_tokens=10)
        encoded = model.read_media(clips[0])
        messages = model.inference_messages(history, encoded)
        # `generate` puts the tag itself; the original's messages carry it already.
        messages = [{**m, "content": m["content"].replace("<video>\n", "", 1)} for m in messages]
        ids = model.generate(clips[0], messages, max_new_tokens=10)
        assert answer.strip() == model.tokenizer.decode(ids).strip()
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 3


def test_a_session_feeds_only_what_is_new(model, clips, monkeypatch):
    session = model.session(clips[0])
    fed = []
    begin = type(model.generator).begin

    def spy(self, requests, *args, **kwargs):
        fed.append(len(requests[0].spliced.tokens))
        return begin(self, requests, *args, **kwargs)

    monkeypatch.setattr(type(model.generator), "begin", spy)
    session.ask("What is shown?", max_new_tokens=6)
    session.ask("And then?", max_new_tokens=6)
    assert fed[0] > model.config.num_media_tokens()
    # An answer may be cut into other tokens when it is read again; what lay before it may not.
    conversation = model.inference_messages(session.messages[:3], session.media)
    assert fed[1] <= len(model.splice(conversation, session.media).tokens) - fed[0]


def test_a_refused_turn_leaves_the_session_whole(model, clips):
    session, fresh = model.session(clips[0]), model.session(clips[0])
    for each in (session, fresh):
        each.ask("What is shown?", max_new_tokens=6)
    for options in ({"temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            session.ask("And then?", **options)
    with pytest.raises(ValueError, match="placeholder"):
        session.ask("And <video>?")
    assert session.ask("Who?", max_new_tokens=6) == fresh.ask("Who?", max_new_tokens=6)


def test_an_abandoned_stream_leaves_the_conversation_as_it_was(model, clips):
    session = model.session(clips[0])
    session.ask("What is shown?", max_new_tokens=6)
    before = session.messages
    next(session.stream("And then?", max_new_tokens=20))
    assert session.messages == before
    fresh = model.session(clips[0])
    fresh.ask("What is shown?", max_new_tokens=6)
    assert session.ask("Who?", max_new_tokens=6) == fresh.ask("Who?", max_new_tokens=6)


def test_an_image_is_encoded_once_and_equals_repeated_frames(model, clips):
    image = clips[0][0]
    repeated = np.repeat(image[None], model.config.num_frames, axis=0)
    once, all_frames = model.encode(image), model.encode(repeated)
    assert np.abs(once - all_frames).max() <= 1e-5 * np.abs(all_frames).max()
    assert len(model.read_media(image).clip.frames) == 1


def test_bf16_follows_float32(model, folder, clips):
    messages = [{"role": "user", "content": "What is shown?"}]
    half = vl.load(folder, dtype="bfloat16")
    exact, rough = model.logits(clips[0], messages), half.logits(clips[0], messages)
    assert rough.dtype == np.float32
    correlation = np.corrcoef(exact.ravel(), rough.ravel())[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(media=None, modality="video"), "needs media"),
        (dict(media=None, modality="smell"), "smell"),
        (dict(media="nowhere.mp4"), "nowhere.mp4"),
        (dict(media=_FRAMES, modality="image"), "holds video, not image"),
        (dict(media=_FRAMES[0], modality="video"), "holds image, not video"),
        (dict(media="nowhere.mp4", num_frames=0), "frame"),
        (dict(media=_FRAMES, question="What does <video> mean?"), "placeholder"),
        (dict(media=None, question="What does <image> mean?"), "placeholder"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.ask(**{"question": "What?", **arguments})


def test_no_room_for_an_answer_is_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.ask(None, "What?", max_new_tokens=0)
