"""Makes the object graphs and graph collections beside this file, with what TensorFlow says.

    python make_graphs.py

needs tensorflow-cpu 2.21, keras 3.15 and tf_keras 2.21 (pip install --no-deps tf_keras). No test
runs it. Writes for each case NAME.graph.gz, the bytes of the object graph, and into graphs.json the
role of every tensor of that checkpoint, named by its key without "/.ATTRIBUTES/VARIABLE_VALUE",
and the nodes that a SavedModel records as not trainable.

Roles are what the framework knows, told from the variable objects (model.trainable_variables,
optimizer.variables, metric.variables ...): each variable is filled with a number of its own before
it is saved, and the number found under a key tells whose key it is.

Writes also NAME.meta.gz and NAME.pb.gz, and into collections.json the collections of their graphs.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.core.protobuf import saved_model_pb2

HERE = Path(__file__).resolve().parent
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
VARIABLE, STATISTICS, OPTIMIZER = "variable", "statistics", "optimizer state"
SHADOW, COUNTER, FIXED = "shadow of another name", "counter", "not trainable"

tf1 = tf.compat.v1
x = np.random.default_rng(1).random((8, 4), "f4")
y = np.random.default_rng(2).random((8, 2), "f4")
CASES: dict[str, Callable[[str], tuple[str, Any]]] = {}


def case(function: Callable[[str], tuple[str, Any]]) -> Callable[[str], tuple[str, Any]]:
    """Register a function (folder) -> (prefix, (role, variables) pairs)."""
    CASES[function.__name__] = function
    return function


# ---------------------------------------------------------------------------- expectations


class Known:
    """Roles of variables; the first that names a variable counts."""

    def __init__(self) -> None:
        self.roles: list[tuple[Any, str]] = []
        self._seen: set[int] = set()

    def add(self, role: str, variables: Iterable[Any]) -> Known:
        for variable in variables:
            variable = variable.value if isinstance(variable, keras.Variable) else variable
            if id(variable) not in self._seen:
                self._seen.add(id(variable))
                self.roles.append((variable, role))
        return self

    def fill(self) -> Known:
        for number, (variable, _) in enumerate(self.roles, 1):
            variable.assign(tf.cast(tf.fill(variable.shape, number), variable.dtype))
        return self

    def of(self, value: Any) -> str:
        """Return the role of the variable that holds `value`."""
        found = {
            role
            for variable, role in self.roles
            if np.array_equal(np.asarray(variable.numpy(), "f8"), np.asarray(value, "f8"))
        }
        if len(found) != 1:
            raise ValueError(f"{value} is of {found or 'no variable'}")
        return found.pop()


def statistics(layers: Iterable[Any]) -> list[Any]:
    return [
        variable
        for layer in layers
        if "BatchNormalization" in type(layer).__name__
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def of_model(known: Known, model: Any) -> Known:
    """Add what a Keras model says about its own variables."""
    known.add(VARIABLE, model.trainable_variables)
    known.add(STATISTICS, statistics(model._flatten_layers()))
    return known.add(FIXED, model.non_trainable_variables)


def of_optimizer(known: Known, optimizer: Any) -> Known:
    known.add(SHADOW, getattr(optimizer, "_model_variables_moving_average", ()))
    for inner in ("inner_optimizer", "loss_scale"):
        state = getattr(optimizer, inner, None)
        if state is not None and hasattr(state, "variables"):
            of_optimizer(known, state)
    variables = optimizer.variables
    known.add(OPTIMIZER, variables() if callable(variables) else variables)
    hyper = [*getattr(optimizer, "_hyper", {}).values(), getattr(optimizer, "_learning_rate", None)]
    known.add(OPTIMIZER, (value for value in hyper if isinstance(value, tf.Variable)))
    scale = getattr(optimizer, "_loss_scale", None)
    if hasattr(scale, "trainable_weights") or hasattr(scale, "_trackable_children"):
        known.add(OPTIMIZER, scale._trackable_children().values())
    return known


def of_metrics(known: Known, model: Any) -> Known:
    for metric in model.metrics:
        known.add(FIXED, metric.variables)
    return known


def save(folder: str, known: Known, checkpoint: Any) -> tuple[str, Known]:
    known.fill()
    known.add(COUNTER, [checkpoint.save_counter])
    checkpoint.save_counter.assign(900)
    return checkpoint.save(folder + "/ckpt"), known


def saved_model(folder: str, known: Known, write: Callable[[str], Any]) -> tuple[str, Known]:
    known.fill()
    write(folder + "/saved")
    return folder + "/saved/variables/variables", known


# ---------------------------------------------------------------------------- Keras 3 and 2


def sequential(k: Any, frozen: bool = False, dropout: bool = False) -> Any:
    layers = [k.Input((4,)), k.layers.Dense(3, name="d1"), k.layers.BatchNormalization(name="bn")]
    layers += [k.layers.Dropout(0.1)] if dropout else []
    model = k.Sequential([*layers, k.layers.Dense(2, name="d2")], name="seq")
    model.layers[0].trainable = not frozen
    return model


def fitted(model: Any, optimizer: Any, **options: Any) -> Any:
    model.compile(optimizer, "mse", **options)
    model.fit(x, y, verbose=0)
    return model


def everything(model: Any) -> Known:
    known = of_optimizer(of_metrics(Known(), model), model.optimizer)
    return of_model(known, model)


def subclass(k: Any) -> Any:
    """Return a model with every way of holding layers and weights, one layer frozen."""

    class Sub(k.Model):
        def __init__(self) -> None:
            super().__init__(name="sub")
            self.first = k.layers.Dense(3, name="first")
            self.bn = k.layers.BatchNormalization(name="bn")
            self.blocks = [k.layers.Dense(3, name="b0"), k.layers.Dense(3, name="b1")]
            self.named = {"x": k.layers.Dense(3, name="bx")}
            self.last = k.layers.Dense(2, name="last")
            self.scale = self.add_weight(shape=(2,), name="scale")
            self.fixed = self.add_weight(shape=(2,), trainable=False, name="fixed")
            self.norm = k.layers.Normalization(name="norm")
            self.norm.adapt(x)
            self.tracker = k.metrics.Mean(name="tracker")
            self.auc = k.metrics.AUC(num_thresholds=3, name="auc")

        def call(self, inputs: Any, training: bool = False) -> Any:
            hidden = self.named["x"](self.norm(inputs))
            hidden = self.bn(self.first(hidden), training=training)
            for block in self.blocks:
                hidden = block(hidden)
            return self.last(hidden) * self.scale + 0 * self.fixed

    model = Sub()
    model(x)
    model.first.trainable = False
    return model


@case
def k3_adam_model_and_optimizer(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(keras), "adam", metrics=["mae"])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return save(folder, everything(model), checkpoint)


@case
def k3_momentum_model(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(keras), keras.optimizers.SGD(0.1, momentum=0.9))
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k3_root_is_the_model(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(keras), "adam")
    known = everything(model).fill()
    return tf.train.Checkpoint(model).write(folder + "/ckpt"), known


@case
def k3_schedule_and_own_names(folder: str) -> tuple[str, Any]:
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = fitted(sequential(keras), keras.optimizers.SGD(rate, momentum=0.9))
    checkpoint = tf.train.Checkpoint(opt=model.optimizer)
    return save(folder, everything(model), checkpoint)


@case
def k3_uncompiled(folder: str) -> tuple[str, Any]:
    model = sequential(keras)
    return save(folder, of_model(Known(), model), tf.train.Checkpoint(model=model))


@case
def k3_compiled_never_fitted(folder: str) -> tuple[str, Any]:
    model = sequential(keras)
    model.compile("sgd", "mse")
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k3_frozen_compiled(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(keras, frozen=True), "adam")
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k3_frozen_with_own_loop(folder: str) -> tuple[str, Any]:
    model = sequential(keras, frozen=True)
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    step = tf.Variable(7, dtype=tf.int64)
    known = of_optimizer(of_model(Known(), model), optimizer).add(COUNTER, [step])
    return save(folder, known, tf.train.Checkpoint(net=model, optimizer=optimizer, step=step))


@case
def k3_frozen_uncompiled(folder: str) -> tuple[str, Any]:
    model = sequential(keras, frozen=True)
    return save(folder, of_model(Known(), model), tf.train.Checkpoint(model=model))


@case
def k3_use_ema_frozen(folder: str) -> tuple[str, Any]:
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)
    model = fitted(sequential(keras, frozen=True), optimizer)
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k3_subclass_compiled(folder: str) -> tuple[str, Any]:
    inner = keras.optimizers.SGD(gradient_accumulation_steps=2)
    model = fitted(subclass(keras), keras.optimizers.LossScaleOptimizer(inner), metrics=["mae"])
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k3_subclass_uncompiled(folder: str) -> tuple[str, Any]:
    model = subclass(keras)
    return save(folder, of_model(Known(), model), tf.train.Checkpoint(model=model))


def gan() -> tuple[Any, Any, Any, Any]:
    nets, optimizers = [], []
    for name in ("g", "d"):
        nets.append(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name=name))
        optimizers.append(keras.optimizers.SGD(0.1, momentum=0.9))
        optimizers[-1].build(nets[-1].trainable_variables)
    return (*nets, *optimizers)


@case
def k3_gan(folder: str) -> tuple[str, Any]:
    g, d, g_optimizer, d_optimizer = gan()
    known = of_model(of_model(Known(), g), d)
    of_optimizer(of_optimizer(known, g_optimizer), d_optimizer)
    checkpoint = tf.train.Checkpoint(
        generator=g, discriminator=d, generator_optimizer=g_optimizer, d_opt=d_optimizer
    )
    return save(folder, known, checkpoint)


@case
def k3_gan_with_one_optimizer(folder: str) -> tuple[str, Any]:
    g, d, _, d_optimizer = gan()
    known = of_optimizer(of_model(of_model(Known(), g), d), d_optimizer)
    checkpoint = tf.train.Checkpoint(generator=g, discriminator=d, d_optimizer=d_optimizer)
    return save(folder, known, checkpoint)


@case
def k3_export_frozen(folder: str) -> tuple[str, Any]:
    model = sequential(keras, frozen=True, dropout=True)
    known = of_model(Known(), model)
    return saved_model(folder, known, lambda path: model.export(path, verbose=False))


@case
def k3_saved_model_compiled(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(keras), "adam")
    return saved_model(folder, everything(model), lambda path: tf.saved_model.save(model, path))


@case
def k2_adam_model_and_optimizer(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(tf_keras), "adam", metrics=["mae"])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return save(folder, everything(model), checkpoint)


@case
def k2_legacy_adam_frozen(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(tf_keras, frozen=True), tf_keras.optimizers.legacy.Adam())
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k2_legacy_sgd_without_slots(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(tf_keras), tf_keras.optimizers.legacy.SGD())
    checkpoint = tf.train.Checkpoint(net=model.layers[-1], opt=model.optimizer)
    return save(folder, everything(model), checkpoint)


@case
def k2_legacy_loss_scale(folder: str) -> tuple[str, Any]:
    inner = tf_keras.optimizers.legacy.SGD(momentum=0.9)
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(inner)
    model = fitted(sequential(tf_keras), optimizer)
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k2_use_ema(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(tf_keras), tf_keras.optimizers.SGD(momentum=0.9, use_ema=True))
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k2_save_weights(folder: str) -> tuple[str, Any]:
    model = fitted(sequential(tf_keras), tf_keras.optimizers.legacy.SGD(momentum=0.9))
    known = everything(model).fill()
    model.save_weights(folder + "/ckpt")
    return folder + "/ckpt", known


@case
def k2_subclass(folder: str) -> tuple[str, Any]:
    model = fitted(subclass(tf_keras), tf_keras.optimizers.SGD(momentum=0.9), metrics=["mae"])
    return save(folder, everything(model), tf.train.Checkpoint(model=model))


@case
def k2_saved_model_frozen(folder: str) -> tuple[str, Any]:
    optimizer = tf_keras.optimizers.legacy.SGD(momentum=0.9)
    model = fitted(sequential(tf_keras, frozen=True), optimizer, metrics=["mae"])
    return saved_model(folder, everything(model), model.save)


# ---------------------------------------------------------------------------- without Keras


class Module(tf.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.w = tf.Variable([[1.0, 2.0]], name="w")
        self.b = tf.Variable([1.0], trainable=False, name="b")
        self.listed = [tf.Variable(1.0), tf.Variable([2.0])]
        self.named = {"a": tf.Variable(1.0)}
        self.moving_mean = tf.Variable([0.0], trainable=False)

    @tf.function
    def __call__(self, inputs: Any) -> Any:
        return inputs * self.w + self.b


def of_module(known: Known, module: Any) -> Known:
    known.add(VARIABLE, module.trainable_variables)
    known.add(STATISTICS, [module.moving_mean])
    return known.add(FIXED, module.variables)


@case
def variable(folder: str) -> tuple[str, Any]:
    v = tf.Variable(1.0)
    return save(folder, Known().add(VARIABLE, [v]), tf.train.Checkpoint(v=v))


@case
def modules(folder: str) -> tuple[str, Any]:
    net = Module()
    net.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
    net.table.insert([1], [500.0])
    counters = [tf.Variable(1), tf.Variable(1, dtype=tf.int64)]
    rate = [tf.Variable(5, dtype=tf.int64), tf.Variable(0.5)]
    random = tf.random.Generator.from_seed(1)
    known = of_module(Known(), net).add(COUNTER, counters).add(OPTIMIZER, rate)
    known.add(FIXED, [random._state_var])
    table = [tf.Variable(np.array([1]), dtype=tf.int64), tf.Variable([500.0])]
    checkpoint = tf.train.Checkpoint(
        net=net,
        step=counters[0],
        global_step=counters[1],
        iter=rate[0],
        learning_rate=rate[1],
        random=random,
    )
    found = save(folder, known, checkpoint)
    known.add(FIXED, table)
    return found


@case
def modules_with_own_optimizer(folder: str) -> tuple[str, Any]:
    root = tf.Module()
    root.encoder, root.decoder = Module("encoder"), Module("decoder")
    root.optimizer = tf.Module()
    root.optimizer.momenta = [tf.Variable([0.0]), tf.Variable(0.0)]
    root.optimizer.model = root.encoder
    root.alias = root.encoder.w
    known = of_module(of_module(Known(), root.encoder), root.decoder)
    known.add(OPTIMIZER, root.optimizer.momenta).fill()
    return tf.train.Checkpoint(root).write(folder + "/ckpt"), known


@case
def module_saved_model(folder: str) -> tuple[str, Any]:
    module = Module()
    module(tf.ones([1, 2]))
    found = saved_model(
        folder, of_module(Known(), module), lambda path: tf.saved_model.save(module, path)
    )
    pack(Path(folder, "saved", "saved_model.pb").read_bytes(), "module_saved_model.pb.gz")
    return found


@case
def v1_adam_in_a_checkpoint(folder: str) -> tuple[str, Any]:
    v = tf.Variable([1.0, 2.0], name="v")
    optimizer = tf1.train.AdamOptimizer(0.1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v * v)
    optimizer.apply_gradients([(tape.gradient(loss, v), v)])
    known = Known().add(VARIABLE, [v]).add(OPTIMIZER, optimizer.variables())
    return save(folder, known, tf.train.Checkpoint(v=v, opt=optimizer))


def untrainable(prefix: str) -> list[int]:
    """Return the nodes that a SavedModel records as not trainable."""
    path = Path(prefix).parent.parent / "saved_model.pb"
    if not path.exists():
        return []
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    nodes = saved.meta_graphs[0].object_graph_def.nodes
    return [
        number
        for number, node in enumerate(nodes)
        if node.WhichOneof("kind") == "variable" and not node.variable.trainable
    ]


def role_of(known: Known, reader: Any, key: str) -> str:
    try:
        return known.of(reader.get_tensor(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def make_graphs() -> None:
    made: dict[str, Any] = {}
    for name, function in CASES.items():
        keras.utils.clear_session()
        tf_keras.backend.clear_session()
        folder = tempfile.mkdtemp()
        prefix, known = function(folder)
        reader = tf.train.load_checkpoint(prefix)
        pack(reader.get_tensor(GRAPH), f"{name}.graph.gz")
        roles: dict[str, list[str]] = {}
        for key in sorted(set(reader.get_variable_to_shape_map()) - {GRAPH}):
            roles.setdefault(role_of(known, reader, key), []).append(key.removesuffix(VALUE))
        made[name] = {"roles": roles, "untrainable": untrainable(prefix)}
        shutil.rmtree(folder)
    (HERE / "graphs.json").write_text(json.dumps(made, indent=1) + "\n")


# ---------------------------------------------------------------------------- graphs


def pack(content: bytes, name: str) -> None:
    (HERE / name).write_bytes(gzip.compress(content, 9, mtime=0))


def build_graph(resource: bool) -> None:
    """Build a network with partitions, batch norm's statistics, a frozen weight and averages."""
    options = {"use_resource": resource}
    with tf1.variable_scope("net"):
        w = tf1.get_variable("w", [2, 3], **options)
        partitioner = tf1.fixed_size_partitioner(3, axis=0)
        emb = tf1.get_variable("emb", [7, 2], partitioner=partitioner, **options)
        tf1.get_variable("bn/moving_mean", [3], trainable=False, **options)
        tf1.get_variable("frozen", [2], trainable=False, **options)
    step = tf1.train.get_or_create_global_step()
    loss = tf.reduce_sum(w) + sum(tf.reduce_sum(part) for part in emb)
    train = tf1.train.MomentumOptimizer(0.1, 0.9).minimize(loss, step)
    average = tf1.train.ExponentialMovingAverage(0.9)
    with tf1.control_dependencies([train]):
        average.apply()


def listed(key: str) -> list[Any]:
    """Return a collection of the graph: name, key, trainable, whether a partition, full shape."""
    rows = []
    for each in dict.fromkeys(v.ref() for v in tf1.get_collection(key)):
        v = each.deref()
        part = v._save_slice_info
        rows.append(
            [
                v.op.name,
                part.full_name if part else v.op.name,
                v.trainable,
                part is not None,
                list(part.full_shape) if part else [],
            ]
        )
    return rows


def write_meta(path: Path) -> None:
    saver = tf1.train.Saver()
    saver.export_meta_graph(str(path), strip_default_attrs=True, clear_devices=True)


def write_saved_model(path: Path) -> None:
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        builder = tf1.saved_model.builder.SavedModelBuilder(str(path.parent / "saved"))
        builder.add_meta_graph_and_variables(session, ["train"], strip_default_attrs=True)
        builder.add_meta_graph(["serve"], strip_default_attrs=True)
        builder.save()
    shutil.move(path.parent / "saved" / "saved_model.pb", path)


def make_collections() -> None:
    made = {}
    for name, resource, write in (
        ("resource.meta", True, write_meta),
        ("reference.meta", False, write_meta),
        ("training.pb", True, write_saved_model),
    ):
        with tf1.Graph().as_default():
            build_graph(resource)
            keys = ("trainable_variables", "moving_average_variables", "variables")
            made[name] = {key: listed(key) for key in keys}
            path = Path(tempfile.mkdtemp()) / name
            write(path)
            pack(path.read_bytes(), name + ".gz")
    with tf1.Graph().as_default():
        tf.constant(1.0)
        made["empty.meta"] = {"trainable_variables": [], "moving_average_variables": []}
        path = Path(tempfile.mkdtemp()) / "empty.meta"
        tf1.train.export_meta_graph(str(path))
        pack(path.read_bytes(), "empty.meta.gz")
    (HERE / "collections.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    make_graphs()
    make_collections()
