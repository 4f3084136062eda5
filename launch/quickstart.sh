#!/usr/bin/env bash
# From a fresh clone to the accuracy of consolidated weights, on a machine with Python >= 3.10.
#
#   bash launch/quickstart.sh [options of vir.train, e.g. --train.epochs 40 --train.seed 7]
#
# Makes .venv, installs, writes 5,000 real handwritten digits as JPEGs in ImageNet's layout, converts them to shards,
# trains a small ViR under DeepSpeed (on one or two GPUs, else on 2 CPU processes), consolidates, evaluates, plots.
# A second run installs nothing and continues, or finds everything done; other options need another --output FOLDER.
# What the programs say is in FOLDER/quickstart.log. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh demo

run=runs/quickstart data=data/digits shards=data/digits-shards
device=auto before=
for word in "$@"; do
  case $before in --output) run=$word ;; --device) device=$word ;; esac
  case $word in --output=*) run=${word#--output=} ;; --device=*) device=${word#--device=} ;; esac
  before=$word
done
chosen=$(python - "$device" <<'PYTHON'
import sys
import torch
from vir import cli, distributed, launcher
from vir.engine.ds_config import name_for_this_machine
from vir.engine.half_precision import measure
from vir.errors import SettingsError

if launcher.wants_cpu(sys.argv[1]):
    launcher.hide_gpus()
try:
    distributed.check_driver()
except SettingsError as error:
    sys.exit(cli.tell(error, "launch/quickstart.sh"))
gpus, settings = torch.cuda.device_count(), name_for_this_machine()
if not gpus:
    bf16 = measure("bf16")
    settings = "zero2_fp32" if bf16.is_slow else "zero2_bf16"
    if bf16.is_slow:
        print(f"bf16 is {bf16.times_slower:.1f} times slower than fp32 on this processor: training in fp32 instead.",
              file=sys.stderr)
# A model this small keeps no more than two busy.
print(*(("auto", min(gpus, 2)) if gpus else ("cpu", 2)), f"ds_configs/{settings}.json")
PYTHON
)
read -r device ranks settings <<<"$chosen"
[ ! -f "$run/ds_config.json" ] || settings=$run/ds_config.json # a run goes on as it began
# glibc would give freed tensors back to the system and fault them in again, at up to half of the time on CPU.
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}

mkdir -p "$run"
log=$run/quickstart.log
step() { printf '\n== %s\n' "$*"; }
follow_no_more() { # it tells what came last
  [ -z "${follower:-}" ] || { kill "$follower" 2>/dev/null && wait "$follower"; } || true
}
failed() {
  follow_no_more
  if [ "$1" = 75 ]; then
    printf '\nstopped and saved; the same command continues\n' >&2
    exit 75
  fi
  tail -n 20 "$log" >&2
  echo "launch/quickstart.sh ended with exit code $1; all that was said is in $log" >&2
  exit "$1"
}
quietly() {
  printf '\n$ %s\n' "$*" >>"$log"
  "$@" >>"$log" 2>&1 || failed $?
}

step "data: 5,000 handwritten digits as JPEG files in ImageNet's layout, and as shards"
quietly python tools/make_demo_dataset.py --output "$data"
for split in train val; do
  [ -e "$shards/$split" ] || quietly python tools/convert_imagenet.py --source "$data" --split "$split" \
    --output "$shards" --name digits --workers 2
done

step "training on $ranks processes with $settings; Ctrl-C saves, and the same command continues"
python tools/follow_run.py "$run" &
follower=$!
trap follow_no_more EXIT
quietly python -m vir.launch deepspeed --num_accelerators "$ranks" --config vir/recipes/quickstart.yaml \
  --deepspeed_config "$settings" --data.train "$shards/train" --data.val "$shards/val" --output "$run" \
  --device "$device" "$@"
follow_no_more

step "consolidation, and evaluation on 1,000 held-out images"
quietly python tools/consolidate_checkpoint.py "$run" --output "$run/vir.safetensors" --force
quietly python tools/consolidate_checkpoint.py "$run" --output "$run/vir_ema.safetensors" --ema --force
quietly python -m vir.evaluate --weights "$run/vir.safetensors" "$run/vir_ema.safetensors" --data "$shards/val" \
  --device "$device" --workers 1 --json "$run/evaluation.json" --force

python - "$run" <<'PYTHON'
import json, pathlib, re, shlex, sys
run = pathlib.Path(sys.argv[1])
raw, ema = json.loads((run / "evaluation.json").read_text())
expected = re.search(r"Expected: (.*)", pathlib.Path("vir/recipes/quickstart.yaml").read_text())[1]
named = {name: shlex.quote(str(run / name)) for name in ("vir_ema.safetensors", "report.html", "")}
print(f"""
held-out top-1: {raw['top1']:.2f} % raw weights, {ema['top1']:.2f} % EMA, on {raw['images']} images
expected        {expected}
weights         {run / 'vir.safetensors'}, {run / 'vir_ema.safetensors'}
curves          {run / 'curves.png'}
metrics         {run / 'metrics.jsonl'}, {run / 'tensorboard'}
checkpoints     {run / 'checkpoints'}
settings        {run / 'config.yaml'}, {run / 'ds_config.json'}
logs            {run / 'log.txt'}, {run / 'quickstart.log'}

What to try next:
  source .venv/bin/activate
  vir-predict {named['vir_ema.safetensors']} data/digits/val/seven
  python tools/report.py {named['']} --output {named['report.html']}
  bash launch/quickstart.sh --model.name vir2d_tiny_patch16_224 --output runs/quickstart-2d
  vir-plan --config vir/recipes/vir_small_in1k.yaml --deepspeed_config zero2_bf16 --nodes 2 --gpu h100-80gb""")
PYTHON
