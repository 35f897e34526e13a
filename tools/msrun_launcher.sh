#!/usr/bin/env bash
# Starts a program on many devices with MindSpore's msrun, with the arguments of MindFormers' script of this name.
#
#   msrun_launcher.sh "PROGRAM ARGS"                                        8 ranks on this machine
#   msrun_launcher.sh "PROGRAM ARGS" WORKER_NUM                             as many on this machine
#   msrun_launcher.sh "PROGRAM ARGS" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
#   msrun_launcher.sh "PROGRAM ARGS" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT
#
# JOIN False goes on in the background, JOIN True waits. Either way a rank that dies ends the others, and the message of it is
# in LOG_DIR/launcher.log, or on the terminal. Environment: MF_LOG_SUFFIX is appended to the log directories,
# PLOG_REDICT_TO_OUTPUT=True puts Ascend's logs into output/plog, PYTHON names the interpreter.

set -u

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

WORKER_NUM=8 LOCAL_WORKER=8 MASTER_ADDR=127.0.0.1 MASTER_PORT=8118 NODE_RANK=0
LOG_DIR=output/msrun_log JOIN=False CLUSTER_TIME_OUT=7200

case $# in
  1) ;;
  2) WORKER_NUM=$2 LOCAL_WORKER=$2 ;;
  6) WORKER_NUM=$2 LOCAL_WORKER=$2 MASTER_PORT=$3 LOG_DIR=$4 JOIN=$5 CLUSTER_TIME_OUT=$6 ;;
  9) WORKER_NUM=$2 LOCAL_WORKER=$3 MASTER_ADDR=$4 MASTER_PORT=$5 NODE_RANK=$6 LOG_DIR=$7 JOIN=$8 CLUSTER_TIME_OUT=$9 ;;
  *) usage ;;
esac

suffix=${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LOG_MF_PATH=$PWD/output/log$suffix
export PYTHONPATH=$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}
if [ "${PLOG_REDICT_TO_OUTPUT:-False}" != False ]; then
  export ASCEND_PROCESS_LOG_PATH=$PWD/output/plog$suffix
fi

# One argument holds a whole command line: the shell takes it apart, as it did when it was given to eval.
eval "order=($1)" || exit 2
exec "${PYTHON:-python}" "$here/msrun_supervisor.py" launch \
  --worker_num="$WORKER_NUM" --local_worker_num="$LOCAL_WORKER" --master_addr="$MASTER_ADDR" \
  --master_port="$MASTER_PORT" --node_rank="$NODE_RANK" --log_dir="$LOG_DIR$suffix" --join="$JOIN" \
  --cluster_time_out="$CLUSTER_TIME_OUT" -- "${order[@]}"
