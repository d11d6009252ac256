"""Generation through the public API, on a random miniature."""

import numpy as np
import pytest

import vllama2_jax as vl

pytest.importorskip("torch")
from oracle import write_miniature

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
    assert fed[1] < fed[0]


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
    ],
)
def test_bad_requests_say_what_is_wrong(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.ask(question="What?", **arguments)


def test_no_room_for_an_answer_is_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.ask(None, "What?", max_new_tokens=0)
