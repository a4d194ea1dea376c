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
    /// The host's TSC, which an emulated guest reads, too; for emulation only.
    pub(crate) tsc: Option<Tsc>,
    pub(crate) ready_port: VsockPort,
    pub(crate) fs_fd: i32,
    pub(crate) vsock: &'a GuestDevice,
    pub(crate) vsock_fd: i32,
    pub(crate) network: Option<(i32, [u8; 6])>,
    /// A distribution's kernel: it finds devices by ACPI, not by its command line,
    /// and has a console before its modules only on a serial port. By this ACPI
    /// it also takes the machine for one without a PIT: its only timer is the
    /// local APIC's.
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
            "console={} quiet reboot=t panic=-1 rcupdate.rcu_expedited=1 dummy.numdummies=0 {}{}",
            if self.generic { "ttyS0" } else { "hvc0" },
            VsockPort::READY_WORD,
            self.ready_port
        );
        // Emulation has no CPU flaws to mitigate, and calibrates slowly.
        if self.acceleration == Acceleration::Emulation {
            line += " mitigations=off no_timer_check";
            if let Some(Tsc { khz, steady }) = self.tsc {
                line += &format!(" tsc_early_khz={khz}");
                // The kernel would check it by counting ticks. Emulation loses
                // some, and then the clock that counts them is kept.
                if steady {
                    line += " tsc=reliable";
                }
            }
            if self.vcpus == 1 && !self.generic {
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

/// The host's TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tsc {
    /// Its frequency.
    pub(crate) khz: u64,
    /// Whether that is its own, not what the CPU happens to run at.
    pub(crate) steady: bool,
}

/// The host's TSC by /proc/cpuinfo.
pub(crate) fn host_tsc(cpuinfo: &str) -> Option<Tsc> {
    let value = |key| {
        let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let mhz = value("cpu MHz")?;
    let (whole, fraction) = mhz.split_once('.').unwrap_or((mhz, ""));
    let thousandths: String = fraction.chars().chain("000".chars()).take(3).collect();
    let mut flags = value("flags").unwrap_or_default().split_whitespace();
    Some(Tsc {
        khz: whole.parse::<u64>().ok()? * 1000 + thousandths.parse::<u64>().ok()?,
        steady: !flags.any(|flag| flag == "aperfmperf"),
    })
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
            tsc: Some(Tsc {
                khz: 2_596_122,
                steady: true,
            }),
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
            "tsc=reliable",
            "mitigations",
            "nolapic_timer",
            "no_timer_check",
        ] {
            assert!(!kvm.contains(word), "{kvm}");
        }
        let tcg = machine(Acceleration::Emulation, &GuestDevice::Daemon).kernel_command_line();
        assert!(tcg.contains("tsc_early_khz=2596122 tsc=reliable"), "{tcg}");
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
    fn a_distributions_kernel_keeps_its_only_timer() {
        let mut machine = machine(Acceleration::Emulation, &GuestDevice::Daemon);
        assert!(machine.kernel_command_line().contains("nolapic_timer"));
        machine.generic = true;
        assert!(!machine.kernel_command_line().contains("nolapic_timer"));
    }

    #[test]
    fn the_tsc_is_read() {
        let tsc = |khz, steady| Some(Tsc { khz, steady });
        assert_eq!(host_tsc("cpu MHz\t\t: 2596.122\n"), tsc(2_596_122, true));
        assert_eq!(host_tsc("cpu MHz\t\t: 3000\n"), tsc(3_000_000, true));
        let turbo = "cpu MHz\t\t: 3000\nflags\t\t: tsc aperfmperf pni\n";
        assert_eq!(host_tsc(turbo), tsc(3_000_000, false));
        assert_eq!(host_tsc("model: x\n"), None);
    }
}
