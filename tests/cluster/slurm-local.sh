#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Start a real one-node Slurm on this machine (Debian, root), or stop it.
#   slurm-local.sh up [STATE_DIR]     install if needed, start munge + slurmctld + slurmd, wait until the node is idle
#   slurm-local.sh down [STATE_DIR]   stop what `up` started
# One partition, `cpu`, of four slots whatever the machine has, so that a few small jobs run at a time; a job that was put
# back waits ten seconds, not two minutes. Accounting is off, so submitit prints harmless `sacct` warnings.
set -euo pipefail
action=${1:?usage: slurm-local.sh up|down [STATE_DIR]}
state=${2:-/var/tmp/slurm-local}
host=$(hostname -s)

stop() {
  for name in slurmd slurmctld munged; do
    [[ -f $state/$name.pid ]] && kill "$(cat "$state/$name.pid")" 2>/dev/null || true
    rm -f "$state/$name.pid"
  done
}

case $action in
  down) stop ;;
  up)
    if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null
    fi
    mkdir -p "$state/ctld" "$state/spool" /run/munge /etc/slurm
    chown munge:munge /run/munge
    cat >/etc/slurm/slurm.conf <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    munge -n >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged --force --pid-file=/run/munge/munged.pid
    cp -f /run/munge/munged.pid "$state/munged.pid" 2>/dev/null || true
    sinfo >/dev/null 2>&1 || slurmctld
    for _ in $(seq 20); do sinfo >/dev/null 2>&1 && break; sleep 0.5; done
    pgrep -x slurmd >/dev/null || slurmd
    for _ in $(seq 40); do [[ $(sinfo -h -o %t 2>/dev/null) == idle ]] && { sinfo; exit 0; }; sleep 0.5; done
    sinfo; tail -n 20 "$state"/slurm*.log; exit 1 ;;
  *) echo "usage: slurm-local.sh up|down [STATE_DIR]" >&2; exit 2 ;;
esac
