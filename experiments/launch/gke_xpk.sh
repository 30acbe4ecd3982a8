#!/usr/bin/env bash
# Pretrains on a GKE cluster's TPUs, one slice or several, through xpk (pip install xpk).
#
#   gke_xpk.sh launch --cluster=pod --zone=us-west4-a --workload=l16 --workdir=gs://my-runs/l16 \
#       -- --config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k
#
# launch   build an image of this checkout, queue the workload
# logs     of the first pod, following        delete   the workload (the cluster stays)
#
# --cluster, --zone, --workload, --workdir   required; the workdir is gs://BUCKET/PATH, or mounted
# --tpu-type=v5litepod-256  --num-slices=1
# --storage=NAME[,NAME]       of `xpk storage attach`: what is mounted
# --data-dir=FOLDER           of the TFDS datasets, mounted too
# --revision=HEAD             the git revision to install
# --base-docker-image=python:3.12  --max-restarts=20  --dry-run (prints the commands instead)
#
# The project is gcloud's (CLOUDSDK_CORE_PROJECT). A process that is killed or exits with 75
# (EX_TEMPFAIL: preempted, run again) makes GKE start all of them again, and the run resumes.

# https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md (xpk 1.16)
# https://jobset.sigs.k8s.io/docs/concepts/ (the labels that find a pod)
cd "$(dirname "$0")/../.."
source experiments/launch/common.sh
flags='cluster zone workload workdir tpu-type num-slices storage data-dir revision'
flags+=' base-docker-image max-restarts'
cluster='' zone='' workload='' workdir='' tpu_type=v5litepod-256 num_slices=1 storage=''
data_dir='' revision=HEAD base_docker_image=python:3.12 max_restarts=20
(($#)) || set -- --help
action=$1
[[ $action == -* ]] || shift
parse "$@"
need cluster zone workload
count max_restarts
positive num_slices
programs xpk kubectl git
where=(--cluster="$cluster" --zone="$zone" --workload="$workload")

launch() {
  local disk storages=()
  need workdir
  check_recipe "$tpu_type*$num_slices"
  check_revision
  checkout=$(git rev-parse --absolute-git-dir)/launch
  trap 'run git worktree remove --force "$checkout"' EXIT
  run git worktree add --detach "$checkout" "$revision"
  for disk in ${storage//,/ }; do storages+=(--storage="$disk"); done
  # exec, because xpk hands a SIGTERM to the shell, not to what the shell runs.
  run xpk workload create "${where[@]}" --tpu-type="$tpu_type" --num-slices="$num_slices" \
    --base-docker-image="$base_docker_image" --script-dir="$checkout" \
    ${storages[@]+"${storages[@]}"} \
    --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=300 \
    --command="pip install --quiet '.[tpu$extras]' && exec $(quoted "${pretrain[@]}")"
}

logs() {
  local pod=jobset.sigs.k8s.io/jobset-name=$workload,jobset.sigs.k8s.io/job-index=0
  run kubectl logs --follow --container=jax-tpu \
    --selector="$pod,batch.kubernetes.io/job-completion-index=0"
}

delete() { run xpk workload delete "${where[@]}" --force; }

case $action in
  launch | logs | delete) "$action" ;;
  *) die "unknown action $action: expected launch, logs or delete" ;;
esac
