#!/usr/bin/env bash
# Pretrains on Cloud TPU VMs, one slice or several, through queued resources.
#
#   tpu_vm.sh launch --name=l16 --zone=us-west4-a --workdir=gs://my-runs/l16 \
#       -- --config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k
#
# launch   create, install, start, watch             create   request the VMs, and wait for them
# install  this checkout, on all VMs                 start    the run, on all VMs
# watch    it until it ends; delete the VMs of a finished one, create preempted ones again
# logs     of the first VM, following                delete   the VMs: until then they cost money
#
# --name, --zone, --workdir   required; the workdir is gs://BUCKET/PATH, or mounted by every VM
# --accelerator-type=v5litepod-256  --runtime-version=v2-alpha-tpuv5-lite  --num-slices=1
# --capacity=on-demand        or spot, or reserved
# --min-slices=SLICES         how few will do, a divisor of --num-slices, after --patience=60 minutes in
#                             the queue: the same global batch, in more microbatches
# --setup=COMMAND             runs on every VM before an installation, perhaps again: mounts
# --data-dir=FOLDER           of the TFDS datasets, mounted too
# --revision=HEAD             the git revision to install
# --max-restarts=20  --poll=60 (seconds)  --dry-run (prints the commands instead)
#
# The project is gcloud's (CLOUDSDK_CORE_PROJECT). On the VMs systemd keeps the run, which needs no
# connection: a process that is killed or exits with 75 (EX_TEMPFAIL: preempted, or another process is
# gone; run again) starts again, and resumes. A run that fails leaves its VMs, to be looked at.

# https://cloud.google.com/tpu/docs/queued-resources (states)
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (all subcommands)
# https://cloud.google.com/tpu/docs/runtimes (runtime versions)
# https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html (Restart)
cd "$(dirname "$0")/../.."
source experiments/launch/common.sh
flags='name zone workdir accelerator-type runtime-version num-slices capacity setup data-dir'
flags+=' revision max-restarts poll min-slices patience'
name='' zone='' workdir='' accelerator_type=v5litepod-256 runtime_version=v2-alpha-tpuv5-lite
num_slices=1 capacity=on-demand setup='' data_dir='' revision=HEAD max_restarts=20 poll=60
min_slices='' patience=60
(($#)) || set -- --help
action=$1
[[ $action == -* ]] || shift
parse "$@"
case $action in
  launch | install | start | watch) need name zone workdir ;;
  create | logs | delete) need name zone ;;
  *) die "unknown action $action: expected launch, create, install, start, watch, logs or delete" ;;
esac
min_slices=${min_slices:-$num_slices}
count max_restarts poll
positive num_slices min_slices patience
if ((min_slices != num_slices)); then
  chips=${accelerator_type##*-}
  [[ $accelerator_type != v4-* && $accelerator_type != v5p-* ]] || ((chips /= 2)) # they count cores
  allow_fewer min_slices "$min_slices" "$num_slices" "$chips"
fi
[[ $capacity =~ ^(on-demand|spot|reserved)$ ]] ||
  die "--capacity=$capacity: expected on-demand, spot or reserved"
programs gcloud git
if [[ -n $workdir ]]; then check_recipe "$accelerator_type*$num_slices"; check_revision; fi

at=("$name" --zone="$zone" --quiet)
all=(--node=all --worker=all)
first=(--node=0 --worker=0)

tpus() { run gcloud compute tpus queued-resources "$@"; }

state() {
  local try
  for try in 1 2 3; do
    ask ACTIVE gcloud compute tpus queued-resources describe "${at[@]}" \
      '--format=value(state.state)' && return
    echo "${0##*/}: try $try of 3 to learn the state of $name failed" >&2
    sleep "$poll"
  done
  return 1
}

request() {
  local nodes=(--node-id="$name")
  (($1 == 1)) || nodes=(--node-count="$1" --node-prefix="$name")
  [[ $capacity == on-demand ]] || nodes+=(--"$capacity")
  tpus create "${at[@]}" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" "${nodes[@]}"
}

create() {
  local now='' seen='' slices=$num_slices waited=0
  request "$slices"
  while now=$(state) || exit; [[ $now != ACTIVE ]]; do
    [[ $now != FAILED && $now != SUSPENDED ]] || die "$name is $now: delete it, and try again"
    [[ $now == "$seen" ]] || echo "$name: $now" >&2
    seen=$now
    if ((slices > min_slices && waited >= 60 * patience)); then
      slices=$(divisor "$((slices - 1))" "$num_slices") waited=0
      echo "$name: $slices of $num_slices slices, after $patience minutes" >&2
      delete
      request "$slices"
    fi
    sleep "$poll"
    ((waited += poll)) || true
  done
}

install() {
  local archive
  archive=$(git rev-parse --absolute-git-dir)/vit_jax.tar.gz
  run git archive --output="$archive" "$revision"
  tpus scp "$archive" "$name:vit_jax.tar.gz" "${all[@]}" "${at[@]:1}"
  [[ -z $setup ]] || tpus ssh "${at[@]}" "${all[@]}" --command="$setup"
  # uv brings a Python that is new enough; that of the VMs' Ubuntu 22.04 is not.
  tpus ssh "${at[@]}" "${all[@]}" --command="sudo systemctl stop vit_jax; set -e; \
rm -rf vit_jax; mkdir vit_jax; tar -xzf vit_jax.tar.gz -C vit_jax; cd vit_jax; \
curl -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv venv --python=3.12; \
~/.local/bin/uv pip install --editable '.[tpu$extras]'"
}

start() {
  local unit=(sudo systemd-run --unit=vit_jax --remain-after-exit)
  unit+=(-p Restart=on-abnormal -p RestartForceExitStatus=75 -p RestartSec=30)
  unit+=(-p StartLimitIntervalSec=1d -p StartLimitBurst="$((max_restarts + 1))")
  unit+=(-p TimeoutStopSec=300 -p LimitMEMLOCK=infinity -p LimitNOFILE=1048576)
  tpus ssh "${at[@]}" "${all[@]}" --command="sudo systemctl stop vit_jax; \
sudo systemctl reset-failed vit_jax; $(quoted "${unit[@]}") --uid=\$USER \
--working-directory=\$HOME/vit_jax /usr/bin/env PATH=\$HOME/vit_jax/.venv/bin:\$PATH \
$(quoted "${pretrain[@]}")"
}

watch() {
  local now='' restarts=0
  while now=$(state) || exit; do
    if [[ $now == ACTIVE ]]; then # then the unit tells: running, exited, failed, dead (VM rebooted)
      now=$(ask exited gcloud compute tpus queued-resources ssh "${at[@]}" "${first[@]}" \
        --command='systemctl show vit_jax --property=SubState --value') || now=unreachable
    fi
    case $now in
      exited) echo "$name: finished" >&2 && break ;;
      failed | FAILED) die "$name: the run $now; its VMs cost money until: tpu_vm.sh delete" ;;
      dead | SUSPENDED)
        ((restarts++ < max_restarts)) || die "$name: $now after $max_restarts restarts"
        echo "$name: $now, restart $restarts of $max_restarts" >&2
        if [[ $now == SUSPENDED ]]; then delete; create; fi
        install # a reboot takes the mounts, a preemption everything
        start
        ;;
      *) sleep "$poll" ;;
    esac
  done
  delete
}

delete() { tpus delete "${at[@]}" --force; }

logs() {
  tpus ssh "${at[@]}" "${first[@]}" --command='sudo journalctl --unit=vit_jax --follow --lines=100'
}

if [[ $action == launch ]]; then create; install; start; watch; else "$action"; fi
