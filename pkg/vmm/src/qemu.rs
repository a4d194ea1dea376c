// SPDX-License-Identifier: Apache-2.0
//! QEMU's command line for a `microvm`, and the guest kernel's.

use podhull_types::VsockPort;

use crate::accel::Acceleration;
use crate::config::SHARE_TAG;
use crate::vsock::GuestDevice;

/// The kernel and initramfs as the jail shows them.
pub(crate) const KERNEL: &str = "/vm-kernel";
/// See [`KERNEL`].
pub(crate) const INITRAMFS: &str = "/vm-initramfs";

/// What the command line is made from. Numbers of descriptors are the child's.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) name: &'a str,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u32,
    pub(crate) acceleration: Acceleration,
    /// Host TSC in kHz, for emulation only.
    pub(crate) tsc_khz: Option<u64>,
    pub(crate) ready_port: VsockPort,
    pub(crate) fs_fd: i32,
    pub(crate) vsock: &'a GuestDevice,
    pub(crate) vsock_fd: i32,
    pub(crate) network: Option<(i32, [u8; 6])>,
    /// A distribution's kernel: it finds devices by ACPI, not by its command line,
    /// and has a console before its modules only on a serial port.
    pub(crate) generic: bool,
}

impl Machine<'_> {
    /// QEMU's arguments.
    pub(crate) fn args(&self) -> Vec<String> {
        let emulated = self.acceleration == Acceleration::Emulation;
        let accel = if emulated { "tcg" } else { "kvm" };
        // Timer, interrupt controller and clock of old cost nothing, and a kernel
        // without kvm-clock calibrates by them and polls an absent clock for 1 s.
        let machine = format!(
            "microvm,accel={accel},pit=on,pic=on,rtc=on,isa-serial={generic},acpi={generic},memory-backend=mem",
            generic = if self.generic { "on" } else { "off" }
        );
        let mut args = Args::default();
        args.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
        args.pair("-display", "none");
        args.pair("-name", format!("podhull-{}", comma_free(self.name)));
        args.pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        args.pair("-M", machine);
        args.pair("-cpu", if emulated { "max" } else { "host" });
        args.pair("-smp", self.vcpus.to_string());
        args.pair("-m", format!("{}M", self.memory_mib));
        args.pair(
            "-object",
            format!(
                "memory-backend-memfd,id=mem,size={}M,share=on",
                self.memory_mib
            ),
        );
        args.pair("-kernel", KERNEL);
        args.pair("-initrd", INITRAMFS);
        args.pair("-append", self.kernel_command_line());
        args.pair("-chardev", "stdio,id=console,signal=off");
        if self.generic {
            args.pair("-serial", "chardev:console");
        } else {
            args.pair("-device", "virtio-serial-device");
            args.pair("-device", "virtconsole,chardev=console");
        }
        args.pair("-chardev", format!("socket,id=fs,fd={}", self.fs_fd));
        args.pair(
            "-device",
            format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG},queue-size=128"),
        );
        match self.vsock {
            GuestDevice::Kernel { cid } => args.pair(
                "-device",
                format!(
                    "vhost-vsock-device,guest-cid={cid},vhostfd={}",
                    self.vsock_fd
                ),
            ),
            GuestDevice::Daemon => {
                args.pair("-chardev", format!("socket,id=vsock,fd={}", self.vsock_fd));
                args.pair("-device", "vhost-user-vsock-device,chardev=vsock");
            }
        }
        if let Some((fd, mac)) = self.network {
            let mac: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            args.pair("-netdev", format!("tap,id=net,fd={fd},vhost=off"));
            args.pair(
                "-device",
                format!("virtio-net-device,netdev=net,mac={}", mac.join(":")),
            );
        }
        args.0
    }

    fn kernel_command_line(&self) -> String {
        let mut line = format!(
            "console={} quiet reboot=t panic=-1 rcupdate.rcu_expedited=1 dummy.numdummies=0 podhull.ready_port={}",
            if self.generic { "ttyS0" } else { "hvc0" },
            self.ready_port
        );
        // Emulation has no CPU flaws to mitigate, and calibrates slowly.
        if self.acceleration == Acceleration::Emulation {
            line += " mitigations=off no_timer_check";
            if let Some(khz) = self.tsc_khz {
                line += &format!(" tsc_early_khz={khz}");
            }
            if self.vcpus == 1 {
                line += " nolapic_timer";
            }
        }
        line
    }
}

#[derive(Debug, Default)]
struct Args(Vec<String>);

impl Args {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }
}

/// A comma separates QEMU's options.
fn comma_free(name: &str) -> String {
    name.replace(',', "_")
}

/// The host's TSC frequency in kHz, from /proc/cpuinfo.
pub(crate) fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let (_, mhz) = line.split_once(':')?;
    let (whole, fraction) = mhz.trim().split_once('.').unwrap_or((mhz.trim(), ""));
    let thousandths: String = fraction.chars().chain("000".chars()).take(3).collect();
    Some(whole.parse::<u64>().ok()? * 1000 + thousandths.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(acceleration: Acceleration, vsock: &GuestDevice) -> Machine<'_> {
        Machine {
            name: "a,b",
            memory_mib: 256,
            vcpus: 1,
            acceleration,
            tsc_khz: Some(2_596_122),
            ready_port: VsockPort(1024),
            fs_fd: 4,
            vsock,
            vsock_fd: 5,
            network: Some((6, [2, 0, 0, 0, 0, 0xff])),
            generic: false,
        }
    }

    #[test]
    fn words_for_emulation_come_with_emulation_only() {
        let kvm = machine(Acceleration::Kvm, &GuestDevice::Daemon).kernel_command_line();
        for word in [
            "tsc_early_khz",
            "mitigations",
            "nolapic_timer",
            "no_timer_check",
        ] {
            assert!(!kvm.contains(word), "{kvm}");
        }
        let tcg = machine(Acceleration::Emulation, &GuestDevice::Daemon).kernel_command_line();
        assert!(tcg.contains("tsc_early_khz=2596122"), "{tcg}");
        let mut two = machine(Acceleration::Emulation, &GuestDevice::Daemon);
        two.vcpus = 2;
        assert!(!two.kernel_command_line().contains("nolapic_timer"));
    }

    #[test]
    fn qemu_is_sandboxed_and_names_cannot_add_options() {
        let args = machine(Acceleration::Kvm, &GuestDevice::Kernel { cid: 77 }).args();
        let line = args.join(" ");
        assert!(
            line.contains("-sandbox on,") && line.contains("spawn=deny"),
            "{line}"
        );
        assert!(line.contains("-name podhull-a_b"), "{line}");
        assert!(line.contains("guest-cid=77,vhostfd=5"), "{line}");
        assert!(line.contains("mac=02:00:00:00:00:ff"), "{line}");
        assert!(line.contains("accel=kvm,pit=on"), "{line}");
    }

    #[test]
    fn the_tsc_is_read() {
        assert_eq!(tsc_khz("cpu MHz\t\t: 2596.122\n"), Some(2_596_122));
        assert_eq!(tsc_khz("cpu MHz\t\t: 3000\n"), Some(3_000_000));
        assert_eq!(tsc_khz("model: x\n"), None);
    }
}
