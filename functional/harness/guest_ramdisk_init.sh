#!/bin/busybox sh
# /init of the test guest's ramdisk: load the drivers, find the root file system, hand over to
# guest_init.sh. Debian's busybox runs its own applets by name, without links, once it finds
# itself as /proc/self/exe.

/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
# Kernel messages would land in the middle of our lines on the same serial port.
echo 1 > /proc/sys/kernel/printk
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
stty -onlcr # plain newlines in the console log

give_up() {
    echo "BOOTWRIGHT error $*"
    poweroff -f
}

while read -r module; do
    insmod "/modules/$module"
done < /modules/order

root=LABEL=bootwright
type=ext4
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
    esac
done

# Disks show up a moment after their driver; 10 s is plenty even on a busy host without KVM.
tries=100
while :; do
    case $root in
        LABEL=* | UUID=*) device=$(findfs "$root" 2> /dev/null) ;;
        *) device=$root ;;
    esac
    [ -b "$device" ] && break
    tries=$((tries - 1))
    [ $tries -gt 0 ] || give_up "no root device $root"
    sleep 0.1
done

mount -t "$type" -o noatime "$device" /newroot || give_up "cannot mount $device"
mount --move /dev /newroot/dev
mount --move /sys /newroot/sys
mount -t proc proc /newroot/proc # a second one: without /proc here busybox finds no applets
exec switch_root /newroot /sbin/init "$device"
