# The lines above this one are from the values; `sbatch` this file from the top of the checkout, on storage that all nodes
# share. Keys (WANDB_API_KEY, HF_TOKEN) are those of the environment that sbatch is called from; no command line has one.
#
# To end a run before its time: `rlsys stop RUN`, or `scancel --batch --signal=TERM JOB`. Both leave a checkpoint.
set -euo pipefail
: "${SLURM_JOB_NODELIST:?start this with sbatch}"
export PATH="$PWD/$bin:$PATH" RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_AUTH_TOKEN
port=${RLSYS_RAY_PORT:-6379}
steps=() driver=

# Whatever ends this script, the steps that it started end before it, and nothing else does.
# shellcheck disable=SC2329 # the trap calls it
finish() {
  local code=$? deadline=$((SECONDS + 60)) pid
  trap - EXIT
  trap '' TERM INT
  for pid in $driver "${steps[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in $driver "${steps[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do
      [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.2
    done
  done
  rm -f "$RAY_AUTH_TOKEN_PATH"
  exit "$code"
}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray-token-${SLURM_JOB_ID:?}
trap finish EXIT
trap 'exit 143' TERM INT
# Others have jobs on the same network, and whoever is let in by Ray can run what he likes.
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

step() { # nodes as a list with commas, how many, command...
  srun --overlap --nodelist="$1" --nodes="$2" --ntasks="$2" "${@:3}" &
  steps+=("$!")
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
others=$(IFS=,; echo "${nodes[*]:1}")
ip=$(srun --overlap --nodelist="$head" --nodes=1 --ntasks=1 hostname --ip-address | awk '{print $1; exit}')
resources=(--num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block)

step "$head" 1 ray start --head --node-ip-address="$ip" --port="$port" "${resources[@]}"
[ -z "$others" ] || step "$others" $((${#nodes[@]} - 1)) ray start --address="$ip:$port" "${resources[@]}"
export RAY_ADDRESS=$ip:$port # what `auto` means, also where there are other clusters

joined() {
  timeout 60 python - "$RAY_ADDRESS" "${#nodes[@]}" <<'PYTHON' 2>/dev/null
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))
PYTHON
}
deadline=$((SECONDS + wait_s))
until joined; do
  for pid in "${steps[@]}"; do
    kill -0 "$pid" 2>/dev/null || { echo "slurm: a node's Ray ended while the cluster was being started" >&2; exit 1; }
  done
  [ "$SECONDS" -lt "$deadline" ] ||
    { echo "slurm: ${#nodes[@]} nodes have not joined $RAY_ADDRESS within $wait_s s" >&2; exit 1; }
  sleep 2
done
echo "slurm: ${#nodes[@]} nodes at $RAY_ADDRESS"

signalled=
trap 'signalled=1; kill -TERM "$driver"' TERM INT
"${command[@]}" &
driver=$!
code=0
while true; do
  wait "$driver" && code=0 || code=$?
  [ -n "$signalled" ] || break
  signalled= # the driver has it, and writes a checkpoint
done
driver=
exit "$code"
