# SPDX-License-Identifier: Apache-2.0
"""The face table: types, masks, files, and that the cost of a batch does not depend on the size of the table."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pyarrow as pa
import pytest

from affect import labels
from affect.data import table as table_module
from affect.data.table import FaceTable, declared_type, to_arrow
from affect.errors import DataError
from tests.data import samples


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("image", pa.string()),
        ("frame", pa.int32()),
        ("au01_occurrence", pa.float32()),
        ("target_au12_intensity", pa.float32()),
        ("expression_happily_surprised", pa.float32()),
        ("expression", pa.string()),
        ("landmarks_98", pa.list_(pa.float32(), 196)),
        ("box", pa.list_(pa.float32(), 4)),
        ("pose_yaw", pa.float32()),
        ("bs_jawOpen", pa.float32()),
        ("attribute_smiling", pa.float32()),
        ("au1_occurrence", None),
        ("landmarks_77", None),
        ("camera", None),
    ],
)
def test_declared_types(name, kind):
    assert declared_type(name) == kind


def test_numbers_and_strings_mask_missing_cells():
    faces = FaceTable.from_columns(
        {
            "image": ["a", "b", "c"],
            "valence": [0.5, None, -1.0],
            "subject": ["x", None, "y"],
            "landmarks_5": (np.arange(30, dtype=np.float32).reshape(3, 10), np.array([True, False, True])),
            "flag": [True, None, False],
        }
    )
    values, valid = faces.numbers("valence")
    assert values.dtype == np.float32
    assert values.tolist() == [0.5, 0.0, -1.0]
    assert valid.tolist() == [True, False, True]
    values, valid = faces.numbers("valence", np.array([2, 1]))
    assert (values.tolist(), valid.tolist()) == ([-1.0, 0.0], [True, False])
    points, valid = faces.numbers("landmarks_5", np.array([1, 2]))
    assert points.shape == (2, 10)
    assert points[0].tolist() == [0] * 10
    assert points[1].tolist() == list(range(20, 30))
    assert valid.tolist() == [False, True]
    text, valid = faces.strings("subject")
    assert (text.tolist(), valid.tolist()) == (["x", "", "y"], [True, False, True])
    assert faces.numbers("flag")[0].tolist() == [1.0, 0.0, 0.0]
    assert faces.numbers("flag", np.array([1]))[1].tolist() == [False]
    assert faces.numbers("valence", np.array([], np.int64))[0].shape == (0,)


def test_reading_rows_equals_reading_all_for_sliced_arrays():
    """Validity bitmaps and values of a slice start inside their buffers."""
    random = np.random.default_rng(0)
    n, start = 100, 13
    scalars = pa.array(random.random(n).astype(np.float32), mask=random.random(n) < 0.3)
    lists = to_arrow((random.random((n, 4)).astype(np.float32), random.random(n) > 0.3))
    flags = pa.array(random.random(n) < 0.5, mask=random.random(n) < 0.3)
    faces = FaceTable.from_arrow(
        pa.table({"image": [str(k) for k in range(n)], "valence": scalars, "box": lists, "flag": flags}).slice(start)
    )
    rows = random.integers(0, n - start, 50)
    for name, column in (("valence", scalars), ("box", lists), ("flag", flags)):
        whole, valid = faces.numbers(name)
        expected = column.slice(start).to_pylist()
        assert valid.tolist() == [value is not None for value in expected]
        zero = [0.0] * 4 if name == "box" else 0.0
        np.testing.assert_array_equal(whole, np.array([zero if v is None else v for v in expected], np.float32))
        some, known = faces.numbers(name, rows)
        np.testing.assert_array_equal(some, whole[rows])
        np.testing.assert_array_equal(known, valid[rows])


def test_a_missing_point_inside_a_list_is_not_a_number():
    points = pa.array([[0.0, 1.0] * 4 + [None, None], [5.0] * 10], pa.list_(pa.float32(), 10))
    faces = FaceTable.from_columns({"image": ["a", "b"], "landmarks_5": points})
    values, valid = faces.numbers("landmarks_5")
    assert valid.all()
    assert np.isnan(values[0, 8:]).all()
    assert np.isfinite(values[0, :8]).all()
    assert np.isfinite(faces.numbers("landmarks_5", np.array([1]))[0]).all()


def test_lossless_casts():
    faces = FaceTable.from_columns(
        {
            "image": pa.array(["a", "b"]).dictionary_encode(),
            "subject": pa.array([1, 2]),
            "au01_occurrence": pa.array([1, None], pa.int64()),
            "au02_occurrence": pa.array([True, False]),
            "valence": pa.array([0.1, 0.2], pa.float64()),
            "box": pa.array([[1, 2, 3, 4], None], pa.list_(pa.float64())),
            "arousal": pa.nulls(2),
            "camera": pa.array(["l", "r"]).dictionary_encode(),
        }
    )
    assert {f.name: f.type for f in faces.arrow.schema} == {
        "image": pa.string(),
        "subject": pa.string(),
        "au01_occurrence": pa.float32(),
        "au02_occurrence": pa.float32(),
        "valence": pa.float32(),
        "box": pa.list_(pa.float32(), 4),
        "arousal": pa.float32(),
        "camera": pa.string(),
    }
    assert faces.numbers("au02_occurrence")[0].tolist() == [1, 0]
    assert faces.strings("subject")[0].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a"], "valence": ["0.5"]}, "column valence holds string, expected float"),
        ({"image": ["a"], "au01_occurrence": [2**25 + 1]}, "column au01_occurrence holds int64, expected float"),
        ({"image": ["a"], "frame": [1.5]}, "column frame holds double, expected int32"),
        ({"image": ["a"], "landmarks_5": [[1.0, 2.0]]}, "column landmarks_5 holds list"),
        ({"image": ["a"], "landmarks_5": np.ones((1, 8))}, "column landmarks_5 holds fixed_size_list"),
        ({"image": ["a"], "valence": [{"x": 1}]}, "column valence holds struct"),
        ({"image": ["a"], "expression": [1.5]}, "column expression holds double, expected string"),
        ({"valence": [0.5]}, "no column image, which it needs; its columns are valence"),
        ({"image": ["a", None]}, "column image, row 1: no path"),
        ({"image": ["a"], "valence": [0.1, 0.2]}, "differ in length"),
    ],
)
def test_bad_columns_are_named(columns, message):
    with pytest.raises(DataError, match=message) as caught:
        FaceTable.from_columns(columns)
    assert "\n" not in str(caught.value)


def test_an_unknown_column_is_named_with_near_ones():
    with pytest.raises(DataError, match=r"no column valense; did you mean valence"):
        samples.table(3).numbers("valense")
    with pytest.raises(DataError, match="not a column of numbers"):
        samples.table(3).numbers("subject")
    with pytest.raises(TypeError, match="rows are indices"):
        samples.table(3).numbers("valence", np.array([True, False, True]))


def test_save_and_open_keep_everything_without_a_copy(tmp_path):
    faces = samples.table(50, tmp_path / "images")
    saved = faces.save(tmp_path / "labels.arrow")
    again = FaceTable.open(tmp_path / "labels.arrow")
    for other in (saved, again):
        assert other.arrow.equals(faces.arrow)
        assert other.metadata == faces.metadata
        assert other.root == tmp_path / "images"
    base = again.numbers("valence")[0]
    assert base.dtype == np.float32
    view = again._views["valence"].values
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert list(tmp_path.iterdir()) == [tmp_path / "labels.arrow"], "no temporary file is left"


def test_a_moved_table_finds_its_images(tmp_path):
    (tmp_path / "old").mkdir()
    samples.table(3, tmp_path / "old" / "images").save(tmp_path / "old" / "labels.arrow")
    (tmp_path / "old").rename(tmp_path / "new")
    assert FaceTable.open(tmp_path / "new" / "labels.arrow").root == tmp_path / "new" / "images"
    assert FaceTable.open(tmp_path / "new" / "labels.arrow", "/elsewhere").root.as_posix() == "/elsewhere"


def test_a_mapped_table_travels_as_its_path(tmp_path):
    faces = samples.table(2000, tmp_path).save(tmp_path / "labels.arrow")
    sent = pickle.dumps(faces)
    assert len(sent) < 1000
    assert pickle.loads(sent).arrow.equals(faces.arrow)
    in_memory = samples.table(5)
    assert pickle.loads(pickle.dumps(in_memory)).arrow.equals(in_memory.arrow)


def test_parquet_and_csv_round_trips(tmp_path):
    faces = samples.table(20, tmp_path)
    faces.to_parquet(tmp_path / "labels.parquet")
    again = FaceTable.read_parquet(tmp_path / "labels.parquet")
    assert again.arrow.equals(faces.arrow)
    assert (again.metadata, again.root) == (faces.metadata, tmp_path)
    faces.to_csv(tmp_path / "labels.csv")
    text = FaceTable.read_csv(tmp_path / "labels.csv")
    assert set(text.names) == set(faces.names)
    for name in faces.names:
        assert text.arrow[name].equals(faces.arrow[name]), name


def test_only_empty_cells_of_text_are_missing(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("image,subject,valence,site\na,NA,NA,None\nb,,,\nc,None,0.5,x\n")
    faces = FaceTable.read_csv(path)
    assert faces.column("subject").to_pylist() == ["NA", None, "None"]
    assert faces.column("valence").to_pylist() == [None, None, 0.5]
    assert faces.column("site").to_pylist() == ["None", None, "x"]


def test_csv_of_missing_points_and_of_foreign_lists(tmp_path):
    points = pa.array([[1.0, 2.0] * 4 + [None, None], None], pa.list_(pa.float32(), 10))
    faces = FaceTable.from_columns({"image": ["a", "b"], "landmarks_5": points})
    faces.to_csv(tmp_path / "p.csv")
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert header.startswith('"image","landmarks_5_x0","landmarks_5_y0"')
    assert FaceTable.read_csv(tmp_path / "p.csv").arrow.equals(faces.arrow)
    foreign = FaceTable.from_columns({"image": ["a"], "embedding": np.ones((1, 3))})
    with pytest.raises(DataError, match="column embedding holds lists"):
        foreign.to_csv(tmp_path / "e.csv")


@pytest.mark.parametrize("reader", [FaceTable.open, FaceTable.read_parquet, FaceTable.read_csv])
def test_missing_and_foreign_files_are_named(reader, tmp_path):
    with pytest.raises(DataError, match=r"no table at .*nothing\.x"):
        reader(tmp_path / "nothing.x")
    if reader != FaceTable.read_csv:
        (tmp_path / "text").write_text("image\na.png\n" * 10)
        with pytest.raises(DataError, match=r"text is not an? (Arrow IPC|Parquet) file"):
            reader(tmp_path / "text")


def test_a_foreign_arrow_file_is_cast(tmp_path):
    foreign = pa.table({"image": ["a", "b"], "valence": pa.array([0.5, 1.0], pa.float64())})
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, foreign.schema) as writer:
        writer.write_table(foreign, max_chunksize=1)
    faces = FaceTable.open(tmp_path / "f.arrow")
    assert faces.arrow.schema.field("valence").type == pa.float32()
    assert faces.numbers("valence")[0].tolist() == [0.5, 1.0]


def test_expressions_come_from_metadata_or_columns():
    assert samples.table(3).expressions == (*samples.CLASSES, "other")
    derived = FaceTable.from_columns({"image": ["a", "b", "c"], "expression": ["sadness", "awe", "neutral"]})
    assert derived.expressions == ("neutral", "sadness", "awe")
    soft = {"image": ["a"], "expression_fear": [0.5], "expression_happily_surprised": [0.5]}
    assert FaceTable.from_columns(soft).expressions == ("fear", "happily surprised")
    assert FaceTable.from_columns({"image": ["a"]}).expressions == ()


def test_take_and_with_columns_leave_the_table_alone():
    faces = samples.table(10)
    some = faces.take(np.array([3, 3, 1]))
    assert some.strings("image")[0].tolist() == [faces.strings("image")[0][k] for k in (3, 3, 1)]
    assert some.expressions == faces.expressions
    more = faces.with_columns({"valence": np.zeros(10, np.float32), "arousal": (np.ones(10), np.arange(10) > 4)})
    assert more.numbers("valence")[0].sum() == 0
    assert more.numbers("arousal")[1].sum() == 5
    assert faces.numbers("valence")[0].any()
    assert faces.with_metadata(notes=["x"]).metadata["notes"] == ["x"]


def test_codes_are_sorted_names():
    faces = FaceTable.from_columns({"image": list("abcd"), "subject": ["z", None, "a", "z"], "camera": [2, 1, 2, 1]})
    codes, names = faces.codes("subject")
    assert (codes.tolist(), names.tolist()) == ([1, -1, 0, 1], ["a", "z"])
    codes, names = faces.codes("camera")
    assert (codes.tolist(), names.tolist()) == ([1, 0, 1, 0], ["1", "2"])


def test_truth_of_a_predictions_table():
    faces = FaceTable.from_columns(
        {
            "image": ["a", "b"],
            "subject": ["x", "y"],
            "row": np.arange(2),
            "valence": [0.1, 0.2],
            "arousal": [0.1, 0.2],
            "target_valence": [0.5, None],
            "expression": ["fear", "fear"],
            "target_expression": ["anger", None],
        }
    )
    truth = faces.truth()
    assert set(truth.names) == {"image", "subject", "row", "valence", "expression"}
    assert truth.numbers("valence")[1].tolist() == [True, False]
    assert truth.strings("expression")[0].tolist() == ["anger", ""]
    with pytest.raises(DataError, match="holds no true labels"):
        truth.truth()


def test_fingerprint_follows_content_alone(tmp_path):
    faces = samples.table(20)
    assert samples.table(20).fingerprint == faces.fingerprint
    assert faces.save(tmp_path / "a.arrow").fingerprint == faces.fingerprint
    values, valid = faces.numbers("valence")
    changed = values.copy()
    changed[3] += 1e-6
    assert faces.with_columns({"valence": changed}).fingerprint != faces.fingerprint
    hidden = valid.copy()
    hidden[0] = False
    assert faces.with_columns({"valence": (values, hidden)}).fingerprint != faces.fingerprint
    assert faces.with_columns({"camera": np.ones(20, np.int64)}).fingerprint != faces.fingerprint
    assert faces.take(np.arange(19)).fingerprint != faces.fingerprint
    shown = FaceTable.from_columns(
        {"image": ["a", "b"], "valence": pa.array([0.0, 9.0]).filter(pa.array([True, True]))}
    )
    garbage = pa.Array.from_buffers(
        pa.float32(), 2, [pa.array([True, False]).buffers()[1], pa.array([0.0, 9.0], pa.float32()).buffers()[1]]
    )
    clean = pa.array([0.0, None], pa.float32())
    tables = [FaceTable.from_columns({"image": ["a", "b"], "valence": column}) for column in (garbage, clean)]
    assert tables[0].fingerprint == tables[1].fingerprint != shown.fingerprint


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "labels.arrow"
    path.write_text("old")

    def interrupted():
        with table_module.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_cost_of_a_batch_does_not_grow_with_the_table(tmp_path):
    """A million rows open at once, and reading a batch touches as many cells as in a small table."""
    n = 1_000_000
    large = pa.table(
        {
            "image": pa.array(["a.png"]).take(pa.array(np.zeros(n, np.int64))),
            "valence": np.zeros(n, np.float32),
            "box": to_arrow(np.zeros((n, 4), np.float32)),
            "au01_occurrence": pa.array(np.zeros(n, np.float32), mask=np.arange(n) % 2 == 0),
        }
    )
    FaceTable(large, tmp_path, {"expressions": ["neutral"]}).save(tmp_path / "large.arrow")
    began = time.perf_counter()
    faces = FaceTable.open(tmp_path / "large.arrow")
    assert time.perf_counter() - began < 1.0
    taken = []
    rows = np.array([5, 999_999, 7])

    class Counting(np.ndarray):
        def __getitem__(self, key):
            taken.append(np.size(key) if isinstance(key, np.ndarray) else len(self))
            return super().__getitem__(key)

    faces.numbers("valence", rows), faces.numbers("au01_occurrence", rows)
    for name in ("valence", "au01_occurrence"):
        view = faces._views[name]
        valid = view.valid and view.valid._replace(data=view.valid.data.view(Counting))
        faces._views[name] = view._replace(values=view.values.view(Counting), valid=valid)
        faces.numbers(name, rows)
    assert taken == [3, 3, 3]


def test_landmark_schemes_have_columns():
    for scheme in labels.SCHEMES.values():
        assert declared_type(scheme.column).list_size == 2 * scheme.points
