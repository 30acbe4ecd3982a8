# shellcheck shell=bash
# Sourced by the launchers: their flags, quoting, --dry-run and the command that all of them run.

set -euo pipefail
exec 3>&1 # commands of a dry run are printed here, even from within $(...)
dry_run='' recipe=()

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Sets a variable for every --flag=value whose name is among `flags`; `recipe` is what follows --.
parse() {
  local key
  while (($#)); do
    case $1 in
      --help) sed -n '2,/^$/s/^# \{0,1\}//p' "experiments/launch/${0##*/}" && exit 0 ;;
      --dry-run) dry_run=yes ;;
      --) shift && recipe=("$@") && break ;;
      --*=*)
        key=${1%%=*} && key=${key#--}
        [[ " $flags " == *" $key "* ]] || die "unknown flag $1: expected --${flags// /, --}"
        printf -v "${key//-/_}" '%s' "${1#*=}"
        ;;
      *) die "cannot read $1: write --flag=value, and the recipe's flags after -- (see --help)" ;;
    esac
    shift
  done
}

need() {
  local key
  for key; do [[ -n ${!key} ]] || die "--${key//_/-} is missing (see --help)"; done
}

# Reads numbers, in base 10 also with zeros in front, which bash would take for octal.
count() {
  local key
  for key; do
    [[ ${!key} =~ ^0*[0-9]{1,9}$ ]] || die "--${key//_/-}=${!key}: expected a number"
    printf -v "$key" '%d' "$((10#${!key}))"
  done
}

positive() {
  local key
  count "$@"
  for key; do ((${!key} > 0)) || die "--${key//_/-}=${!key}: expected a number, 1 or more"; done
}

# The largest number up to $1 that divides $2: so many share evenly what $2 share.
divisor() {
  local number=$1
  while (($2 % number)); do ((number--)); done
  echo "$number"
}

# Of the flag $1: $2 machines will do where the recipe is for $3 with $4 devices each.
allow_fewer() {
  (($3 % $2 == 0)) || die "--${1//_/-}=$2: expected a divisor of $3, so that the batch divides"
  recipe+=(--config.mesh.devices="$(($3 * $4))")
}

programs() {
  local program
  for program; do
    [[ -n $dry_run ]] || type -P "$program" >/dev/null || die "$program is not installed here"
  done
}

# The arguments as one line that a shell reads as the same arguments.
quoted() {
  local word line='' quote="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quote}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it; one that fails is reported, and ends the script.
run() {
  if [[ -n $dry_run ]]; then quoted "$@" >&3 && return; fi
  "$@" && return
  local status=$?
  echo "exit code $status from: $(quoted "$@")" >&2
  return "$status"
}

# Builds the recipe for $1 devices, as the run will build it, if a Python here can.
build_recipe() {
  local name needs='import importlib.util as u, sys; sys.exit(not (u.find_spec("flax")'
  needs+=' and u.find_spec("grain") and u.find_spec("orbax")))'
  [[ -d vit_jax ]] || return 0
  for name in "${python:-python3}" .venv/bin/python python3 python; do
    if type -P "$name" >/dev/null && "$name" -c "$needs" 2>/dev/null; then
      "$name" -m vit_jax.pretrain "${recipe[@]}" --check="$1" || die "the recipe can't be trained"
      return
    fi
  done
  echo "${0##*/}: the recipe isn't checked: no Python here has what vit_jax needs" >&2
}

# What follows --, checked for $1 devices: on the machines a mistake costs their price. Sets
# `pretrain`.
check_recipe() {
  local word
  config=''
  for word in ${recipe[@]+"${recipe[@]}"}; do
    case $word in
      --config=*) config=${word#--config=} && config=${config%%:*} ;;
      --workdir* | --distributed*) die "$word after --: the launcher adds it, from its own flags" ;;
    esac
  done
  [[ -n $config ]] || die "no recipe: end with -- --config=configs/pretrain/RECIPE.py:ARGUMENT"
  [[ -f $config ]] || die "no recipe $config in $PWD"
  [[ $workdir == /* || $workdir == gs://?* ]] ||
    die "--workdir=$workdir: expected gs://BUCKET/PATH, or an absolute path that every machine mounts"
  [[ $data_dir != *://* ]] || die "--data-dir=$data_dir: expected a folder that every machine mounts"
  if [[ $workdir == gs://* ]]; then extras=,gcs; else extras=''; fi
  [[ -n ${SLURM_JOB_ID:-} ]] || build_recipe "$1"
  pretrain=("${python:-python}" -m vit_jax.pretrain "${recipe[@]}")
  pretrain+=(--workdir="$workdir" --distributed)
  [[ -z $data_dir ]] || pretrain=(env TFDS_DATA_DIR="$data_dir" "${pretrain[@]}")
}

# Turns `revision` into a commit that holds the recipe.
check_revision() {
  local name=$revision
  revision=$(git rev-parse --verify --quiet "$name^{commit}") || die "--revision=$name: no commit"
  git cat-file -e "$revision:$config" 2>/dev/null ||
    die "$config is not in git's $name: commit it, or choose another --revision"
  [[ $name != HEAD || -z $(git status --porcelain) ]] ||
    echo "${0##*/}: uncommitted changes stay here: the run gets HEAD, $revision" >&2
}

# The last line that a command prints. A dry run prints the command, and answers with $1.
ask() {
  if [[ -n $dry_run ]]; then quoted "${@:2}" >&3 && echo "$1" && return; fi
  "${@:2}" | tail -n 1
}
