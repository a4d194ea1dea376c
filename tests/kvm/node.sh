#!/bin/sh
# PID 1 of the node with KVM: what an init system would have set up, then /out/job, then the end.
# SPDX-License-Identifier: Apache-2.0
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec </dev/null >/dev/console 2>&1
mount -t tmpfs -o mode=0755 run /run
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -sf "/proc/self/fd/${number%%:*}" "/dev/${number#*:}"; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
  echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
mount --make-rshared /
# A disk: what is below cannot be the upper layer of another overlay, or is memory.
mount -t ext4 /dev/vda /var/tmp && chmod 1777 /var/tmp
ip link set lo up
hostname node-with-kvm
# As systemd has it; the kernel's own limit is 4096.
ulimit -Hn 1048576
while sleep 5; do echo "lane: alive, $(cut -d ' ' -f 1 /proc/uptime) s"; done &
echo "lane: ready, $(cut -d ' ' -f 1 /proc/uptime) s"
/out/job >/out/job.log 2>&1 </dev/null
echo $? >/out/code
echo "lane: done, $(cut -d ' ' -f 1 /proc/uptime) s"
sync
umount /var/tmp
echo o >/proc/sysrq-trigger
# The power goes while PID 1 still runs.
sleep 60
