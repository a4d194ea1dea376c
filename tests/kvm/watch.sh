#!/bin/sh
# Looks at the node's VMMs from outside of their pods while the suite runs, and writes down in /out/vmms what each
# one was: its accelerator, its vsock device, the files it has open, and whether an AF_VSOCK connection to it existed.
# A daemon that would stand in for the kernel's vsock is written to /out/daemons. Ends when it is killed.
# SPDX-License-Identifier: Apache-2.0
seen=' '
talked=' '
# look PID: notes a VMM once it has opened its devices, and its connection when there is one.
look() {
  line=$(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline") || return
  # Not the guests that cases start without a pod.
  case $line in *'-name podhull-'*) ;; *) return ;; esac
  shim=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$1/status" 2>/dev/null) || return
  cid=${line##*guest-cid=}
  cid=${cid%%[!0-9]*}
  case $seen in
    *" $1 "*) ;;
    *)
      open=$(ls -l "/proc/$1/fd" 2>/dev/null)
      # It is still in the jail's program, or before its first vCPU.
      case $line$open in *-accel*kvm-vcpu* | *accel=*kvm-vcpu* | *accel=tcg*) ;; *) return ;; esac
      kvm=no vsock=no
      case $line in *accel=kvm*) case $open in *kvm-vcpu*) kvm=yes ;; esac ;; esac
      case $line in *vhost-vsock-device*) case $open in */dev/vhost-vsock*) vsock=yes ;; esac ;; esac
      seen="$seen$1 "
      echo "pid=$1 cid=$cid kvm=$kvm vhost-vsock=$vsock" >>/out/vmms
      ;;
  esac
  case $talked in *" $1 "*) return ;; esac
  # Sockets are listed by network namespace: the shim's.
  if nsenter -t "$shim" -n ss --vsock --no-header 2>/dev/null | grep -q "ESTAB.*[ :]$cid:"; then
    talked="$talked$1 "
    echo "cid=$cid connected" >>/out/connections
  fi
}
# containerd's log, which has the shims' in it: the suite removes it with its node.
keep_log() {
  until log=$(ls -d /var/tmp/podhull-node-*/containerd.log 2>/dev/null); do sleep 1; done
  exec tail -n +1 -F $log >/out/containerd.log 2>/dev/null
}
keep_log &
trap 'kill $!; exit' TERM
while sleep 1; do
  for pid in $(pidof qemu-system-x86_64); do look "$pid"; done
  daemons=$(pidof vhost-device-vsock) && echo "$daemons" >>/out/daemons
done
