"""`hub:owner/name`: a Hub dataset only when it is meant, and how large it is before it comes."""

import shutil
from types import SimpleNamespace

import pytest
from hub import FILES, SIZE, TRAIN, Broken, Hub, NoHub

from outside_in.data import sources
from outside_in.data.sources import availability, dataset_folder


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def set_free_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def refusal(dataset, function=dataset_folder):
    with pytest.raises(ValueError) as caught:
        function(dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dataset", ["hub:owner/both", "owner/both"])
def test_both_forms_of_a_name_are_one_dataset(serve, data_folder, dataset):
    serve(Hub)
    assert dataset_folder(dataset) == data_folder / "owner" / "both"
    assert dataset_folder("hub:owner/both", fetch=False) == dataset_folder("owner/both", fetch=False)
    assert (data_folder / "owner" / "both" / TRAIN).read_bytes() == FILES[TRAIN]


def test_a_folder_does_not_hide_what_is_meant_to_come_from_the_hub(serve, tmp_path, data_folder):
    serve(Hub)
    (tmp_path / "owner" / "both").mkdir(parents=True)
    assert dataset_folder("owner/both").samefile(tmp_path / "owner" / "both")
    assert dataset_folder("hub:owner/both") == data_folder / "owner" / "both"


@pytest.mark.parametrize("dataset", ["data/one", "owner/one"])
@pytest.mark.parametrize("fetch", [False, True])
def test_a_missing_folder_asks_no_stranger(serve, tmp_path, dataset, fetch):
    hub = serve(Hub)
    (tmp_path / "owner").mkdir()  # `data` need not be there yet
    told = refusal(dataset, lambda name: dataset_folder(name, fetch=fetch))
    assert told.startswith(f"dataset: no folder {dataset!r}; ") and f"write hub:{dataset}" in told
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "owner/", "/name", "../up", "two words/x", "hub:a/b", "a/.."])
def test_what_can_be_no_id_of_the_hub_is_refused(name):
    assert "expected hub:owner/name for a Hub dataset" in refusal(f"hub:{name}")


def test_a_line_before_the_download_says_what_comes_and_how_large_it_is(serve, logged, data_folder):
    hub = serve(Hub)
    hub.hangs_up_at = [500] * 6
    refusal("hub:owner/both")
    dataset_folder("hub:owner/both")
    dataset_folder("hub:owner/both")
    both = f"fetching validation.safetensors and train.safetensors of owner/both from the Hub: {2 * SIZE / 1000:.1f} kB"
    rest = f"fetching train.safetensors of owner/both from the Hub: {(SIZE - 500) / 1000:.1f} kB"
    assert logged == [f"{line}, into {data_folder / 'owner' / 'both'}" for line in (both, rest)]


def test_a_download_that_the_disk_cannot_hold_does_not_begin(serve, monkeypatch):
    hub = serve(Hub)
    set_free_disk(monkeypatch, 2 * SIZE - 1)
    for function in (availability, dataset_folder):
        assert "to fetch, but the disk has" in refusal("hub:owner/both", function)
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("size", "free", "expected"),
    [
        (20 * 10**9, 78 * 10**9, "will be fetched (20 GB, 78 free)"),
        (999, 78 * 10**9, "will be fetched (999 B, 78 GB free)"),
        (1_500_000, 20_000_000, "will be fetched (1.5 MB, 20 MB free)"),
    ],
)
def test_what_will_be_fetched_is_known_without_fetching_it(serve, monkeypatch, data_folder, size, free, expected):
    hub = serve(Hub)
    hub.datasets = {"both": {TRAIN}}
    monkeypatch.setattr(Hub, "send_known_file", lambda self, revision, name, content: send_size(self, revision, size))
    set_free_disk(monkeypatch, free)
    assert availability("hub:owner/both") == expected
    assert hub.downloads == [] and not data_folder.exists()


def send_size(handler, revision, size):
    handler.answer(200, {"X-Repo-Commit": revision, "ETag": '"one"', "X-Linked-Size": size})


def test_what_is_here_is_found_and_what_can_be_made_will_be_made(serve, tmp_path):
    hub = serve(Hub)
    dataset_folder("hub:owner/both")
    hub.requests.clear()
    assert availability("hub:owner/both") == availability("owner/both") == "found"
    assert availability("builtin/every-token/bytes") == "will be made on this machine"
    assert hub.requests == []


def test_what_the_hub_lacks_is_missing_and_a_hub_that_is_silent_is_no_refusal(serve):
    serve(Hub)
    for name in ("hub:owner/none", "hub:owner/no-train"):
        assert refusal(name, availability).startswith(f"dataset: {name!r} could not be fetched from the Hub: 404")
    serve(NoHub)
    assert "not from the Hub" in refusal("hub:owner/both", availability)
    serve(Broken)
    assert "will be fetched (of unknown size: the Hub cannot be reached now; " in availability("hub:owner/both")


def test_offline_what_is_not_here_is_missing(serve, monkeypatch):
    hub = serve(Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("hub:owner/both", availability)
    assert hub.requests == []
