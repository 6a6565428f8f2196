#!/bin/sh
# An encrypted volume for LUTHIER_HOME on one machine, by LUKS: deploy/encrypted-volume.sh DEVICE FOLDER
# DEVICE is an empty disk or partition; everything on it is lost. cryptsetup asks for the passphrase.
set -eu
device=${1:?device, such as /dev/nvme1n1}
folder=${2:?folder, such as /var/lib/luthier}
cryptsetup luksFormat --type luks2 "$device"
cryptsetup open "$device" luthier
mkfs.ext4 /dev/mapper/luthier
mkdir -p "$folder"
mount /dev/mapper/luthier "$folder"
chown luthier: "$folder" && chmod 700 "$folder"
# After a restart of the machine: cryptsetup open DEVICE luthier && mount /dev/mapper/luthier FOLDER
# Swap can hold parts of the memory: encrypt it too, or have none.
