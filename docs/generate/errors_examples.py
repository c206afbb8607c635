"""The examples of docs/errors.md: blocks of commands by class of error and by code of warning.

All commands of the page run in order in one directory, in which `fixtures` leads to the fixtures of
the repository. One that ends in ``# exit 13`` must end so. They need neither root nor a network.
"""

from __future__ import annotations

RUN = "fixtures/digits/run"
_NUMPY = 'python3 -c "import numpy as np; {}"'
_KEEP_TOUCHING = (
    "while :; do touch changing/digits-step-0100.safetensors; done & "
    "ema-avg run changing --decay 0.9 -o a.safetensors; code=$?; kill $!; exit $code  # exit 12"
)

ERRORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "UsageError": (
        (f"ema-avg run {RUN} --decay 0.9  # exit 2",),
        (f"ema-avg run {RUN} --outptu average.safetensors  # exit 2",),
        (f"ema-avg plan {RUN} --decay 99.9  # exit 2",),
        (f"ema-avg plan {RUN} --average halflife:500  # exit 2",),
        (f"ema-avg plan {RUN} --average mean@5000:9000  # exit 2",),
        ("ema-avg inspect fixtures/torch/gan/gan-10.pt --key netg  # exit 2",),
        (
            "printf '[run]\\ndeacy = 0.9\\n' > ema.toml",
            f"ema-avg run {RUN} --config ema.toml -o average.safetensors  # exit 2",
        ),
    ),
    "NothingToAverage": (
        (f"ema-avg plan {RUN} --glob 'digits-stp-*'  # exit 10",),
        (f"ema-avg plan {RUN} --steps 5000:9000  # exit 10",),
        ("mkdir empty", "ema-avg plan empty  # exit 10"),
    ),
    "Locked": (
        (
            "flock .average.safetensors.ema-avg.tmp "
            f"ema-avg run {RUN} --decay 0.9 -o average.safetensors  # exit 11",
        ),
        (
            f"ema-avg run {RUN} --decay 0.9 --state state -q > /dev/null",
            f"flock state/LOCK ema-avg run {RUN} --decay 0.9 --state state  # exit 11",
        ),
    ),
    "InputError": (
        ("ema-avg plan fixtures/digts/run  # exit 12",),
        ("ema-avg inspect fixtures/digits/run/digits-step-0150.safetensors  # exit 12",),
        ("printf text > notes.txt", "ema-avg inspect notes.txt  # exit 12"),
    ),
    "DamagedFile": (
        (
            f"head -c 2000 {RUN}/digits-step-0100.safetensors > cut.safetensors",
            "ema-avg inspect cut.safetensors  # exit 12",
        ),
    ),
    "UnsupportedInput": (
        ("printf GGUF > model.gguf", "ema-avg inspect model.gguf  # exit 12"),
        ("ema-avg plan fixtures/tensorflow/v1/model.ckpt-0  # exit 12",),
    ),
    "InputChanged": ((f"cp -rL {RUN} changing", _KEEP_TOUCHING),),
    "DamagedState": (
        (
            "cp -r state damaged && printf x >> damaged/ROOT",
            "ema-avg export damaged -o average.safetensors  # exit 12",
        ),
    ),
    "Disagreement": (
        (f"ema-avg plan {RUN} --include 'hidden1/kernal'  # exit 13",),
        ("ema-avg plan fixtures/torch/gan/gan-10.pt  # exit 13",),
        (
            "mkdir twice && "
            + _NUMPY.format("[np.savez(f'twice/{name}-100', w=[1.0]) for name in 'ab']"),
            "ema-avg plan twice  # exit 13",
        ),
        (f"ema-avg plan {RUN} --exclude 'hiden1/*'  # exit 13",),
        (
            "mkdir unnumbered && "
            + _NUMPY.format("[np.savez(f'unnumbered/{n}', w=[1.0]) for n in ('first', 'second')]"),
            "ema-avg plan unnumbered  # exit 13",
        ),
        (
            _NUMPY.format("np.savez('model-1', w=np.zeros(3)); np.savez('model-2', w=np.zeros(4))"),
            "ema-avg plan model-1.npz model-2.npz  # exit 13",
        ),
    ),
    "OutputExists": (
        (
            f"ema-avg run {RUN} --decay 0.9 -o average.safetensors -q",
            f"ema-avg run {RUN} --decay 0.8 -o average.safetensors  # exit 14",
        ),
    ),
    "DamagedOutput": (
        (
            f"ema-avg run {RUN} --decay 0.9 -o flipped.safetensors -q",
            "printf x | dd of=flipped.safetensors bs=1 seek=9001 conv=notrunc 2> /dev/null",
            "ema-avg verify flipped.safetensors  # exit 12",
        ),
    ),
    "Outlier": (
        (
            "mkdir spike && "
            + _NUMPY.format(
                "[np.savez(f'spike/step-{k}', w=np.full(9, k + 50.0 * (k == 6))) "
                "for k in range(1, 11)]"
            ),
            "ema-avg run spike --decay 0.5 --outliers error -o spike.npz  # exit 13",
        ),
    ),
    "StorageError": (
        (f"ulimit -f 8; ema-avg run {RUN} --decay 0.9 -o b.safetensors  # exit 15",),
        (f"ema-avg run {RUN} --decay 0.9 -o /dev/null/b.safetensors  # exit 15",),
    ),
    "OtherSettings": ((f"ema-avg run {RUN} --decay 0.99 --state state  # exit 16",),),
    "NonFinite": (
        (
            _NUMPY.format("np.savez('loss-1', w=[1.0]); np.savez('loss-2', w=[np.nan])"),
            "ema-avg run loss-1.npz loss-2.npz --average mean -o mean.npz  # exit 17",
        ),
    ),
    "Stopped": (
        ("timeout --preserve-status -s INT 3 ema-avg watch empty --state live -q  # exit 130",),
        ("timeout --preserve-status -s TERM 3 ema-avg watch empty --state live -q  # exit 143",),
    ),
}

WARNINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "already-averaged": (("ema-avg plan fixtures/torch/lightning-ema > /dev/null",),),
    "assumed-statistics": (
        (
            "python3 -c \"import h5py; f = h5py.File('bn.weights.h5', 'w'); "
            "f.update({f'bn/vars/{k}': [1.0, 2.0] for k in range(4)})\"",
            "ema-avg plan bn.weights.h5 > /dev/null",
        ),
    ),
    "decay-never-reached": (
        (f"ema-avg plan {RUN} --decay 0.999 --num-updates count > /dev/null",),
    ),
    "disk-space": (
        (
            'python3 -c "h = b\'{\\"w\\": {\\"dtype\\": \\"F32\\", \\"shape\\": [2000000000000], '
            "\\\"data_offsets\\\": [0, 8000000000000]}}'; f = open('huge.safetensors', 'wb'); "
            "f.write(len(h).to_bytes(8, 'little') + h); f.truncate(8 + len(h) + 8 * 10 ** 12)\"",
            "ema-avg plan huge.safetensors --dtype float64 > /dev/null; rm huge.safetensors",
        ),
    ),
    "first-dominates": (
        (f"ema-avg plan {RUN} --decay 0.999 > /dev/null",),
        (f"ema-avg plan {RUN} --decay 0.999 --state new > /dev/null",),
    ),
    "frozen-shadow": (
        (
            "ema-avg plan fixtures/digits/bf16 --decay 0.999 --num-updates step "
            "--shadow-dtype same > /dev/null",
        ),
    ),
    "keras-suffix": (("ema-avg plan fixtures/keras/weights -o average.h5 > /dev/null",),),
    "last-dominates": ((f"ema-avg plan {RUN} --decay 0.05 > /dev/null",),),
    "object-graph": (
        (
            "ema-avg plan fixtures/tensorflow/keras/compiled --optimizer drop "
            "--average mean -o averages/ > /dev/null",
        ),
    ),
    "one-checkpoint": ((f"ema-avg plan {RUN}/digits-step-0100.safetensors > /dev/null",),),
    "output-exists": ((f"ema-avg plan {RUN} -o average.safetensors > /dev/null",),),
    "quantised": (
        (
            "python3 -c \"import h5py; f = h5py.File('int8.weights.h5', 'w'); "
            ""
            "f.create_dataset('layers/dense/vars/0', (2,), 'i1'); "
            "f['layers/dense/vars/1'] = [0.5]; "
            "f['layers/last/vars/0'] = [[0.5]]\"",
            "ema-avg plan int8.weights.h5 > /dev/null",
        ),
    ),
    "shadow-names": (
        (f"ema-avg plan {RUN} --names shadow --format safetensors-folder -o folder > /dev/null",),
    ),
    "duplicate": (
        (
            "mkdir again && "
            + _NUMPY.format(
                "[np.savez(f'again/step-{k}', w=np.full(9, k - 1.0 * (k == 6))) "
                "for k in range(1, 11)]"
            ),
            "ema-avg run again --decay 0.5 --stats -o again.npz 2>&1 > /dev/null | head -2",
        ),
    ),
    "outlier": (
        ("ema-avg run spike --decay 0.5 --stats -o spike.npz 2>&1 > /dev/null | head -2",),
    ),
    "unknown-variable": ((f"EMA_AVG_RUN_DECCAY=0.9 ema-avg plan {RUN} --decay 0.9 > /dev/null",),),
    "weights-do-not-sum": ((f"ema-avg plan {RUN} --decay 0.9 --init zeros > /dev/null",),),
}

# What each code means, and a class that says it to programmers.
MEANINGS = {
    "EmaError": "The root of the tree; itself it is what the program did not expect.",
    "Stopped": "A signal ended the command, or nobody reads its output any more.",
    "already-averaged": "The training averaged its weights itself, and these are the averages.",
    "assumed-statistics": "A file without the classes of its layers: by number and shape, four "
    "vectors of one length are those of batch normalisation.",
    "decay-never-reached": "With --num-updates the ramp decides every update, so that another "
    "decay would give the same result.",
    "disk-space": "The output does not fit: `run` would end with exit code 15.",
    "duplicate": "Of `run --stats`: two checkpoints in a row hold the same values.",
    "first-dominates": "The classic: a decay that was meant per training step, applied once per "
    "checkpoint. The hint has the commands that were probably meant, with the share each leaves on "
    "the first; with a state, which is bound to its average, they begin another one.",
    "frozen-shadow": "In a half type the updates are smaller than the shadow's last bit.",
    "keras-suffix": "Keras chooses its reader by the name of a file, and here the wrong one.",
    "last-dominates": "The average is nearly its last checkpoint.",
    "not-averaged": "Tensors of the model that no average exists of.",
    "object-graph": "A TensorFlow checkpoint tells whoever restores it of tensors it lacks.",
    "one-checkpoint": "An average of one is that one.",
    "outlier": "Of `run --stats`: a checkpoint is much farther from the average before it than its "
    "neighbours are: a loss spike, or a file of another run.",
    "output-exists": "Of `plan`: `run` would end with exit code 14.",
    "quantised": "Tensors beside 8 bit weights, such as their scales, are copied.",
    "shadow-names": "Loaders of this format ask for the variables' own names.",
    "unknown-variable": "A variable of the environment begins with EMA_AVG_ and means nothing.",
    "weights-do-not-sum": "With init=zeros the result is smaller than an average would be.",
}

WITHOUT_EXAMPLE = {
    "EmaError": ("no command is known to make it"),
    "not-averaged": "it takes a PyTorch model with quantised or sparse tensors",
}
