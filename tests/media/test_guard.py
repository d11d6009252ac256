import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rendered import pictures, write_video

from vllama2_jax.media import ImageSpec, Limits, MediaError, load_clip
from vllama2_jax.media.guard import DECODER

SPEC = ImageSpec(32, "stretch", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("guard") / "v.mp4", pictures(30))


def load(video, **limits):
    return load_clip(video, spec=SPEC, num_frames=4, limits=Limits(**limits))


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_one_worker_serves_many_files(video):
    first = load(video)
    pid = DECODER.pid
    assert np.array_equal(load(video).frames, first.frames)
    assert DECODER.pid == pid


def test_a_bad_file_does_not_cost_the_worker(video, tmp_path):
    load(video)
    pid = DECODER.pid
    (tmp_path / "bad.mp4").write_bytes(b"nothing" * 99)
    with pytest.raises(MediaError):
        load(tmp_path / "bad.mp4")
    load(video)
    assert DECODER.pid == pid


def test_a_decode_past_its_deadline_is_killed_and_the_next_one_works(video):
    truth = load(video)
    pid = DECODER.pid
    os.kill(pid, signal.SIGSTOP)  # hangs, as a broken decoder does
    with pytest.raises(MediaError, match=r"took longer than 0\.2 s.*max_seconds"):
        load(video, max_seconds=0.2)
    assert not is_alive(pid)
    assert np.array_equal(load(video).frames, truth.frames)
    assert DECODER.pid != pid


def test_a_request_that_nobody_takes_is_stopped_at_its_deadline(video):
    truth = load(video)
    pid = DECODER.pid
    os.kill(pid, signal.SIGSTOP)
    more_than_a_pipe_holds = "x" * 300_000
    with pytest.raises(MediaError, match=r"took longer than 0\.2 s"):
        DECODER.ask("probe", [str(video)], Limits(max_seconds=0.2), words=more_than_a_pipe_holds)
    assert not is_alive(pid)
    assert np.array_equal(load(video).frames, truth.frames)


def test_a_long_request_arrives_whole(video):
    result, _ = DECODER.ask("probe", [str(video)], Limits(), words="x" * 300_000)
    assert result["num_frames"] == 30


def test_a_deadline_that_never_comes_is_no_error(video):
    assert len(load(video, max_seconds=float("inf")).frames) == 4


def test_what_cannot_be_sent_costs_no_worker(video):
    load(video)
    pid = DECODER.pid
    with pytest.raises(TypeError, match="cannot be sent"):
        DECODER.ask("probe", [str(video)], Limits(), words=object())
    load(video)
    assert DECODER.pid == pid


def test_a_fault_of_ours_is_not_blamed_on_the_file(video):
    load(video)
    pid = DECODER.pid
    with pytest.raises(MediaError) as caught:
        DECODER.ask("dance", [str(video)], Limits())
    error = caught.value
    assert error.path == str(video) and "internal error (KeyError: 'dance')" in error.cause
    assert "report" in error.remedy and "\n" not in str(error)
    assert error.__notes__[0].startswith("Traceback") and "decoder.py" in error.__notes__[0]
    load(video)
    assert DECODER.pid == pid


def test_a_crash_names_the_file_and_the_next_one_works(video):
    truth = load(video)
    DECODER.close()

    def kill_the_next():
        while DECODER.pid is None:
            time.sleep(0.001)
        os.kill(DECODER.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_next)
    killer.start()
    with pytest.raises(MediaError, match=r"v\.mp4: the decoder crashed on it \(signal 9"):
        load(video)
    killer.join()
    assert np.array_equal(load(video).frames, truth.frames)


@pytest.mark.parametrize("when", ["between requests", "in a request"])
def test_a_worker_that_served_before_and_died_costs_no_file(video, when):
    truth = load(video)
    pid = DECODER.pid
    if when == "between requests":
        os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    assert np.array_equal(load(video).frames, truth.frames)
    assert DECODER.pid != pid


def test_threads_share_the_worker(video):
    truth, found = load(video), []
    threads = [threading.Thread(target=lambda: found.append(load(video).frames)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(np.array_equal(frames, truth.frames) for frames in found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
def test_a_fork_has_a_worker_of_its_own(video, capfd):
    truth = load(video)
    parents = DECODER.pid
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here: whatever happens, leave at once
        code = 1
        try:
            same = DECODER.pid is None and np.array_equal(load(video).frames, truth.frames)
            os.write(writing, str(DECODER.pid).encode())
            code = 0 if same else 2
            DECODER.close()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        childs = int(pipe.read())
    assert os.waitstatus_to_exitcode(status) == 0
    assert capfd.readouterr() == ("", "")
    assert childs not in (parents, child)
    assert DECODER.pid == parents and is_alive(parents)
    assert np.array_equal(load(video).frames, truth.frames)


@pytest.mark.parametrize("end", ["exits", "is killed"])
@pytest.mark.parametrize("state", ["idle", "deaf"])
def test_the_worker_ends_with_its_process(video, end, state):
    code = (
        "import os, signal, sys, threading, time\n"
        "from vllama2_jax.media import CLIP_336, load_clip\n"
        "from vllama2_jax.media.guard import DECODER\n"
        f"load_clip({str(video)!r}, spec=CLIP_336, num_frames=4)\n"
        "print(DECODER.pid, flush=True)\n"
    )
    if state == "deaf":
        # Someone else holds the worker's input open, so that it never sees the end of it.
        code += (
            "import subprocess\n"
            "subprocess.Popen(['sleep', '12'], stdout=subprocess.DEVNULL,\n"
            "    stderr=subprocess.DEVNULL, pass_fds=[DECODER._worker.stdin.fileno()])\n"
        )
    if end == "is killed":
        code += "os.kill(os.getpid(), signal.SIGKILL)\n"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr == ""
    assert gone_within(int(process.stdout), 10)


def test_a_thread_in_the_middle_of_a_decode_does_not_hold_up_the_exit(video):
    code = (
        "import os, signal, threading, time\n"
        "from vllama2_jax.media import CLIP_336, load_clip\n"
        "from vllama2_jax.media.guard import DECODER\n"
        f"load = lambda: load_clip({str(video)!r}, spec=CLIP_336, num_frames=4)\n"
        "load()\n"
        "print(DECODER.pid, flush=True)\n"
        "os.kill(DECODER.pid, signal.SIGSTOP)\n"
        "threading.Thread(target=load, daemon=True).start()\n"
        "while not DECODER._lock.locked():\n"
        "    time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert process.returncode == 0
    assert gone_within(int(process.stdout), 5)


def test_nothing_of_ffmpeg_reaches_the_users_terminal(video, tmp_path):
    data = bytearray(video.read_bytes())
    begin = data.index(b"mdat") + 600
    data[begin : begin + 3000] = b"\xff" * min(3000, len(data) - begin)
    (tmp_path / "d.mp4").write_bytes(data)
    code = (
        "from vllama2_jax.media import CLIP_336, MediaError, load_clip\n"
        "try:\n"
        f"    load_clip({str(tmp_path / 'd.mp4')!r}, spec=CLIP_336, num_frames=16)\n"
        "except MediaError as error:\n"
        "    pass\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.stdout, process.stderr, process.returncode) == ("", "", 0)


def test_importing_media_pulls_in_nothing_heavy():
    code = (
        "import sys, vllama2_jax.media\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'av', 'multiprocessing', 'tensorflow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr
