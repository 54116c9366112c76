#!/usr/bin/env bash
# A real Slurm of four virtual nodes on one Debian host, as root: no systemd, no cgroups, loopback only.
#   cluster.sh up | down | status | kill-node NAME | revive-node NAME | stop-controller | start-controller | env
# `up` installs Debian's packages where they are missing and may be repeated. Each node is a slurmd in PID and UTS
# namespaces of its own, so `kill-node` takes slurmd, its steps and every process of its jobs at once, as a power cut
# does. `env` prints what a client needs. Two clusters live side by side with two VMAMBA_SLURM_DIR and _PORT.
set -euo pipefail
DIR=${VMAMBA_SLURM_DIR:-/run/vmamba-slurm} PORT=${VMAMBA_SLURM_PORT:-16800}
NODES=4 CPUS=8 MEM_MB=8000 GPUS=2
CONF=$DIR/etc/slurm.conf TAG="# vmamba-slurm $DIR"
export SLURM_CONF=$CONF

say() { echo "cluster.sh: $*" >&2; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
end() { # PIDFILE [SIGNAL]: end a process that this script started, and wait for it
  [ -s "$1" ] || return 0
  local pid; pid=$(cat "$1")
  kill "-${2:-TERM}" "$pid" 2>/dev/null || true
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
  rm -f "$1"
}

install() {
  local missing=() package
  for package in munge slurmctld slurmd slurm-client; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  say "installing ${missing[*]}"
  local policy=/usr/sbin/policy-rc.d made=0 # the packages would start daemons of their own
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=1; fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  [ $made = 0 ] || rm -f $policy
}

configure() {
  mkdir -p "$DIR"/{etc,log,run,state,munge,dev}
  chmod 755 "$DIR" "$DIR"/*
  cat >"$CONF" <<C
ClusterName=vmamba
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/spool.%n/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
# CPUs, memory and GPUs are declared, not found; nothing is bound
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobContainerType=job_container/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
EnforcePartLimits=ALL
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# short times
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout=15
TCPTimeout=5
MessageTimeout=20
BatchStartTimeout=30
UnkillableStepTimeout=30
MinJobAge=900
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_resolution=60
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
AccountingStorageType=accounting_storage/none
C
  : >"$DIR/hosts"
  local i
  for i in $(seq 0 $((GPUS - 1))); do [ -e "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3; done
  echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/etc/gres.conf"
  for i in $(seq "$NODES"); do
    echo "NodeName=node$i NodeAddr=127.0.77.$i Port=$((PORT + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS" \
      "ThreadsPerCore=1 RealMemory=$MEM_MB Gres=gpu:$GPUS State=UNKNOWN" >>"$CONF"
    echo "127.0.77.$i node$i $TAG" >>"$DIR/hosts"
  done
  cat >>"$CONF" <<C
PartitionName=main Nodes=ALL Default=YES MaxTime=120 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=120 DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=120 DefaultTime=10 State=UP PriorityTier=20 PreemptMode=OFF
PartitionName=members Nodes=ALL MaxTime=120 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF AllowAccounts=science
C
  name_nodes
}

unname_nodes() { # /etc/hosts may be a mount of its own: it is written to, never replaced
  awk -v tag="$TAG" 'substr($0, length($0) - length(tag) + 1) != tag' /etc/hosts >"$DIR/hosts.rest"
  cat "$DIR/hosts.rest" >/etc/hosts
}
name_nodes() { # nodes meet under their names
  awk -v tag="$TAG" 'substr($0, length($0) - length(tag) + 1) == tag' /etc/hosts | cmp -s - "$DIR/hosts" && return 0
  unname_nodes
  cat "$DIR/hosts" >>/etc/hosts
}

start_munge() {
  alive "$DIR/run/munged.pid" && return 0
  [ -s "$DIR/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/munge.key")
  chmod 600 "$DIR/munge/munge.key"
  rm -f "$DIR"/munge/munge.socket*
  /usr/sbin/munged --force --key-file="$DIR/munge/munge.key" --socket="$DIR/munge/munge.socket" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/munge.seed"
}

start_node() { # NAME: the pid file holds the process whose end is the end of the node's namespace
  alive "$DIR/run/node.$1.pid" && return 0
  mkdir -p "$DIR/spool.$1"
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid unshare --uts --pid --fork --kill-child --mount-proc \
    /bin/sh -c 'hostname "$1"; slurmd -D -f "$2" -N "$1"; exit $?' sh "$1" "$CONF" \
    </dev/null >>"$DIR/log/node.$1.out" 2>&1 &
  echo $! >"$DIR/run/node.$1.pid"
}

start_controller() { alive "$DIR/run/slurmctld.pid" || slurmctld -f "$CONF"; }

ready() { [ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N 2>/dev/null | wc -l)" = "$NODES" ]; }

up() {
  [ "$(id -u)" = 0 ] || { say "must be root: nodes are namespaces"; exit 1; }
  command -v apt-get >/dev/null || { say "needs a Debian: its packages are what is brought up"; exit 1; }
  install
  configure
  start_munge
  start_controller
  local i
  for i in $(seq "$NODES"); do start_node "node$i"; done
  for _ in $(seq 600); do
    if ready; then say "up: $NODES nodes; $0 env says how to reach them"; return 0; fi
    sleep 0.1
  done
  say "the nodes did not come up"
  sinfo -N -l >&2 || true
  tail -n 5 "$DIR"/log/*.log >&2
  exit 1
}

down() {
  local file
  for file in "$DIR"/run/node.*.pid; do [ -e "$file" ] && end "$file" KILL; done
  end "$DIR/run/slurmctld.pid"
  end "$DIR/run/munged.pid"
  if [ -d "$DIR" ]; then unname_nodes; fi
  rm -rf "$DIR"
  say down
}

status() {
  [ -e "$CONF" ] || { say "down"; return 1; }
  sinfo -N -o '%N %t %C %G %P'
  squeue -a
  local file
  for file in "$DIR"/run/*.pid; do
    if alive "$file"; then echo "${file##*/} running"; else echo "${file##*/} dead"; fi
  done
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  kill-node) end "$DIR/run/node.${2:?a node}.pid" KILL ;;
  revive-node) start_node "${2:?a node}" ;;
  stop-controller) end "$DIR/run/slurmctld.pid" ;; # jobs run on, nobody can ask for anything
  start-controller) start_controller ;;
  env) echo "export SLURM_CONF=$CONF" ;;
  *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
