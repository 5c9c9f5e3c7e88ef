#!/bin/busybox sh
# /sbin/init of the test guest: say on the first serial port what this guest sees, one line for
# each fact, then stay up until the power button is pressed. $1 is the root device.

exec < /dev/ttyS0 > /dev/ttyS0 2>&1
device=$1

say() { echo "BOOTWRIGHT $*"; }

off() {
    sync
    mount -o remount,ro /
    poweroff -f
}

cd / || off
say "guest kernel=$(uname -r)"

# The host computes the same sum over the same list: see content_sha256() in guest.py.
sum=$(find bin sbin etc payload -type f | sort | xargs sha256sum | sha256sum)
say "content sha256=${sum%% *}"
say "root device=${device#/dev/} bytes=$(blockdev --getsize64 "$device")"

for disk in /sys/block/vd* /sys/block/sd*; do
    [ -e "$disk" ] || continue
    name=${disk##*/}
    # virtio has a file for it; a SCSI disk a page of vital product data, after four bytes.
    serial=$(cat "$disk/serial" 2> /dev/null || tail -c +5 "$disk/device/vpd_pg80" 2> /dev/null)
    say "disk $name bytes=$(blockdev --getsize64 "/dev/$name") serial=$serial"
done

# Survives in whatever the host gave us to write on: an overlay, a copy, a volume.
read -r count 2> /dev/null < /var/bootcount
count=$((${count:-0} + 1))
echo $count > /var/bootcount
sync
say "bootcount=$count"

# As cloud-init does it: a file system that is its whole device grows with the flavor.
resize2fs "$device" > /dev/null 2>&1 || say "error growing $device"
sync # there is no journal, and the power may go any moment
say "filesystem bytes=$(($(stat -f -c '%b * %S' /)))"

if drive=$(findfs LABEL=config-2 2> /dev/null); then
    mount -o ro "$drive" /mnt
    metadata=/mnt/openstack/latest/meta_data.json
    field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" $metadata; }
    say "config-drive hostname=$(field hostname) uuid=$(field uuid)"
    umount /mnt
fi
if drive=$(findfs LABEL=cidata 2> /dev/null); then
    mount -o ro "$drive" /mnt
    field() { sed -n "s/^$1: *//p" /mnt/meta-data; }
    say "config-drive hostname=$(field local-hostname) uuid=$(field instance-id)"
    umount /mnt
fi

read -r uptime _ < /proc/uptime
say "ready uptime=$uptime"

grep -qw bootwright.poweroff /proc/cmdline && off

# The first event of the ACPI power button is its press (24 bytes: the kernel refuses to
# read less than one whole event). Without a button, sleep for ever.
for input in /sys/class/input/event*; do
    if [ "$(cat "$input/device/name")" = "Power Button" ]; then
        dd if="/dev/input/${input##*/}" of=/dev/null bs=24 count=1 2> /dev/null
        say "power button"
        off
    fi
done
while :; do sleep 3600; done
