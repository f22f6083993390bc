#!/bin/sh
# nvidia-cuda-mps-control without a GPU: a daemon is a pid file in the pipe directory.
# FAKE_MPS names a directory with what it knows: servers, clients-<server>. It writes commands,
# the environment that the daemon was started in, and reads `broken`, why no daemon starts.
pipe=${CUDA_MPS_PIPE_DIRECTORY:?}
pid=$pipe/nvidia-cuda-mps-control.pid
if [ "$1" = "-d" ]; then
    if [ -e "$FAKE_MPS/broken" ]; then
        echo "the log says why" > "${CUDA_MPS_LOG_DIRECTORY:?}/control.log"
        cat "$FAKE_MPS/broken"
        exit 1
    fi
    env > "$FAKE_MPS/environment"
    echo 1 > "$pid"
    exit 0
fi
if [ ! -e "$pid" ]; then
    echo "Cannot find MPS control daemon process"
    exit 1
fi
while read -r command argument rest; do
    echo "$command $argument $rest" >> "$FAKE_MPS/commands"
    case $command in
        get_server_list) cat "$FAKE_MPS/servers" 2> /dev/null ;;
        get_client_list) cat "$FAKE_MPS/clients-$argument" 2> /dev/null ;;
        quit) rm "$pid" ;;
    esac
done
exit 0
