#!/bin/busybox sh
# /init of the node with KVM: modules, then the machine's own root, read-only by 9p, below a layer in memory.
# SPDX-License-Identifier: Apache-2.0
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /lower /memory /root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module" || echo "lane: cannot load $module"; done
by_9p=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o "$by_9p,cache=loose,ro" root /lower
mount -t tmpfs -o mode=0755 memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work,index=off,xino=off,redirect_dir=off root /root
mkdir -p /root/lib/modules /root/out
mount -t 9p -o "$by_9p,cache=loose,ro" modules /root/lib/modules
# Not cached: what is written there is on the machine at once.
mount -t 9p -o "$by_9p" out /root/out
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
# Not chroot: containers' pivot_root wants a root that is a mount.
exec switch_root /root /out/node.sh
