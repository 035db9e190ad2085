//! The VMM's configuration of one VM: pure.

use std::path::Path;

use bedplate_api::node::VmSpec;
use bedplate_api::vmm::{
    BootSource, CacheType, ChunkSource, Drive, Entropy, MachineConfig, NetworkInterface, VmConfig, Vsock,
};

use crate::identity::format_mac;
use crate::image::Bootable;
use crate::net::vms::Nic;

/// Each VM's sockets are a directory of its own, so that all may have the same number.
const GUEST_CID: u32 = 3;

/// The configuration of the VM of `spec`, which boots `boot` from the disk in the directory `disk`, gets what that
/// lacks from `chunk_source`, and is talked to through `vsock`.
pub fn vm_config(
    spec: &VmSpec,
    boot: &Bootable,
    disk: &Path,
    vsock: &Path,
    nic: Option<&Nic>,
    chunk_source: Option<ChunkSource>,
) -> VmConfig {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let boot_source = BootSource {
        kernel_image_path: Some(text(&boot.kernel)),
        initrd_path: boot.initrd.as_deref().map(text),
        boot_args: Some(cmdline(spec, &boot.cmdline)),
        ..BootSource::default()
    };
    let names_root = boot_source.names_root();
    VmConfig {
        boot_source: Some(boot_source),
        drives: vec![Drive {
            drive_id: "disk".to_owned(),
            path_on_host: Some(text(disk)),
            socket: None,
            // The VMM adds `root=` for a root device; an image that names its root itself knows better.
            is_root_device: !names_root,
            partuuid: None,
            is_read_only: None,
            cache_type: CacheType::Writeback,
            io_engine: None,
            rate_limiter: None,
            chunk_source,
        }],
        machine_config: MachineConfig { vcpu_count: spec.cpus, mem_size_mib: spec.memory_mib, ..Default::default() },
        network_interfaces: nic
            .map(|nic| NetworkInterface {
                iface_id: "eth0".to_owned(),
                host_dev_name: Some(nic.tap.clone()),
                socket: None,
                guest_mac: Some(format_mac(nic.mac)),
                mtu: None,
                rx_rate_limiter: None,
                tx_rate_limiter: None,
                queue_pairs: None,
                vhost: false,
            })
            .into_iter()
            .collect(),
        vsock: Some(Vsock { guest_cid: GUEST_CID, uds_path: text(vsock), vsock_id: None }),
        entropy: Some(Entropy::default()),
        ..Default::default()
    }
}

/// The image's command line, without what we set ourselves, then what was asked for, then the console and the name.
fn cmdline(spec: &VmSpec, image: &str) -> String {
    let ours = ["console=", "systemd.hostname="];
    let kept = image.split_ascii_whitespace().filter(|word| !ours.iter().any(|o| word.starts_with(o)));
    let mut words: Vec<&str> = kept.chain(spec.cmdline.split_ascii_whitespace()).collect();
    let hostname = format!("systemd.hostname={}", spec.name);
    words.extend(["console=ttyS0", &hostname]);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use bedplate_api::node::{DiskMode, Power, RestartPolicy};
    use bedplate_api::{Digest, VmId};

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            id: VmId::random(),
            name: "web-1".into(),
            image: Digest::ZERO,
            cpus: 2,
            memory_mib: 512,
            disk: DiskMode::NonPersistent,
            power: Power::Running,
            restart: RestartPolicy::Always,
            cmdline: "quiet".into(),
        }
    }

    fn boot(cmdline: &str) -> Bootable {
        Bootable {
            image: Digest::ZERO,
            kernel: "/k".into(),
            initrd: Some("/i".into()),
            cmdline: cmdline.into(),
            disk_size: 1,
        }
    }

    #[test]
    fn the_guest_is_told_its_name_its_console_and_its_root() {
        let nic = Nic { tap: "bp-00000000".into(), mac: [2, 0, 0, 0, 0, 1] };
        let config = vm_config(
            &spec(),
            &boot("ro console=tty0 root=UUID=x"),
            Path::new("/d"),
            Path::new("/v"),
            Some(&nic),
            None,
        );
        let args = config.boot_source.unwrap().boot_args.unwrap();
        assert_eq!(args, "ro root=UUID=x quiet console=ttyS0 systemd.hostname=web-1");
        assert!(!config.drives[0].is_root_device);
        assert_eq!(config.network_interfaces[0].guest_mac.as_deref(), Some("02:00:00:00:00:01"));
        let bare = vm_config(&spec(), &boot(""), Path::new("/d"), Path::new("/v"), None, None);
        assert!(bare.drives[0].is_root_device && bare.network_interfaces.is_empty());
    }
}
