"""ViR at scale has no one program; these are installed, and each tells its flags with --help:

    vir-convert       turns labelled images into shards              python -m vir.convert
    vir-verify        says whether shards are what was written       python -m vir.verify
    vir-index         makes shards from elsewhere ready to train on  python -m vir.index
    vir-check         finds what is wrong with machines                python -m vir.check
    vir-plan          tells memory, time and cost before a run       python -m vir.plan
    vir-train         trains, continues and validates a backbone     python -m vir.train
    vir-launch        starts that by a launcher, on many machines    python -m vir.launch
    vir-explain       tells which samples a step had                 python -m vir.explain
    vir-consolidate   makes one weights file of a checkpoint         python -m vir.consolidate
    vir-evaluate      tells the accuracy of a weights file           python -m vir.evaluate
    vir-predict       names what is on images                        python -m vir.predict
    vir-export        makes ONNX, torch.export, Hugging Face of one  python -m vir.export

Several processes are started by a launcher: deepspeed --module vir.train, torchrun -m vir.train, and the same of
vir.evaluate.
"""

import sys

if __name__ == "__main__":
    print(__doc__, end="")
    sys.exit(2 if sys.argv[1:] else 0)
