//! What belongs to one machine, by the names that its files have on the common distributions.

use bedplate_api::image::TraceKind::{self, CloudInit, History, HostKey, Lease, Log, MachineId, Seed};

/// What becomes of what a rule finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// A regular file loses its content and stays, with its owner and mode: something waits for an empty one.
    Empty,
    /// A regular file goes.
    Remove,
    /// A link goes; what it means stays.
    Unlink,
    /// Whatever is below a directory goes; the directory stays.
    Clear,
    /// Below a directory, logs that were put aside go, others are emptied: programs that make no log themselves, and do
    /// not run as root, need the one that is there.
    Trim,
}

/// One line of [`RULES`].
pub(super) struct Rule {
    pub(super) kind: TraceKind,
    /// A path without the first `/`. A `*` stands for any bytes but `/`. No link is followed on the way.
    pub(super) path: &'static str,
    pub(super) act: Act,
}

const fn rule(kind: TraceKind, path: &'static str, act: Act) -> Rule {
    Rule { kind, path, act }
}

/// The first rule that speaks of a file counts.
pub(super) const RULES: &[Rule] = &[
    // systemd makes a new one where the file is empty. Where it is absent, it takes the boot for the first one ever, and
    // sets all services to what the distribution wants.
    rule(MachineId, "etc/machine-id", Act::Empty),
    // Often a link to the other; D-Bus makes a new one.
    rule(MachineId, "var/lib/dbus/machine-id", Act::Remove),
    rule(HostKey, "etc/ssh/ssh_host_*_key", Act::Remove),
    rule(HostKey, "etc/ssh/ssh_host_*_key.pub", Act::Remove),
    rule(HostKey, "etc/ssh/ssh_host_*_key-cert.pub", Act::Remove),
    rule(HostKey, "etc/dropbear/dropbear_*_host_key", Act::Remove),
    rule(HostKey, "etc/dropbear/dropbear_*_host_key.pub", Act::Remove),
    rule(Lease, "var/lib/dhcp/*.lease*", Act::Remove),
    rule(Lease, "var/lib/dhclient/*", Act::Remove),
    rule(Lease, "var/lib/dhcpcd/*", Act::Remove),
    rule(Lease, "var/lib/dhcpcd5/*", Act::Remove),
    rule(Lease, "var/lib/NetworkManager/*.lease", Act::Remove),
    // What NetworkManager derives the machine's DHCP and IPv6 names from, and which connections it has seen.
    rule(Lease, "var/lib/NetworkManager/secret_key", Act::Remove),
    rule(Lease, "var/lib/NetworkManager/seen-bssids", Act::Remove),
    rule(Lease, "var/lib/NetworkManager/timestamps", Act::Remove),
    rule(Lease, "var/lib/wicked/*.xml", Act::Remove),
    // systemd-networkd keeps its own leases in /run; here are those that it gave to others.
    rule(Lease, "var/lib/systemd/network/dhcp-server-lease/*", Act::Remove),
    rule(Seed, "var/lib/systemd/random-seed", Act::Remove),
    rule(Seed, "var/lib/systemd/credential.secret", Act::Remove),
    rule(Seed, "var/lib/urandom/random-seed", Act::Remove),
    rule(Seed, "var/lib/random-seed", Act::Remove),
    rule(Seed, "var/lib/seedrng/*", Act::Remove),
    rule(Seed, "var/lib/misc/random-seed", Act::Remove),
    // cloud-init makes its directories anew. What an administrator may have put there for all machines (`seed`, `scripts`)
    // stays.
    rule(CloudInit, "var/lib/cloud/instance", Act::Unlink),
    rule(CloudInit, "var/lib/cloud/instances", Act::Clear),
    rule(CloudInit, "var/lib/cloud/data", Act::Clear),
    rule(CloudInit, "var/lib/cloud/sem", Act::Clear),
    rule(CloudInit, "var/lib/cloud/handlers", Act::Clear),
    // That the directory is there tells journald to keep a journal.
    rule(Log, "var/log/journal", Act::Clear),
    rule(Log, "var/log", Act::Trim),
    rule(Log, "var/lib/systemd/coredump/*", Act::Remove),
    rule(Log, "var/crash/*", Act::Remove),
    rule(History, "root/.*_history", Act::Remove),
    rule(History, "root/.viminfo", Act::Remove),
    rule(History, "root/.lesshst", Act::Remove),
    rule(History, "home/*/.*_history", Act::Remove),
    rule(History, "home/*/.viminfo", Act::Remove),
    rule(History, "home/*/.lesshst", Act::Remove),
];

/// Files that are one machine's too, and stay: nothing makes them anew, and services do not start without them.
pub(super) const KEPT: &[(&str, &str)] = &[
    (
        "/etc/iscsi/initiatorname.iscsi",
        "the name of its iSCSI initiator: two machines with one name damage what they share",
    ),
    ("/etc/nvme/hostid", "the number of its NVMe host"),
    ("/etc/krb5.keytab", "its Kerberos keys"),
    ("/etc/ssl/private/ssl-cert-snakeoil.key", "the key of its self-signed certificate"),
    (
        "/etc/netplan/50-cloud-init.yaml",
        "network settings by cloud-init, which may name its network card; cloud-init renews them",
    ),
    ("/swapfile", "swap space, with what was in memory"),
    ("/swap.img", "swap space, with what was in memory"),
];

/// Whether `name` is what `pattern` means.
pub(super) fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|at| matches(rest, &name[at..])),
        Some((first, rest)) => name.split_first().is_some_and(|(byte, after)| byte == first && matches(rest, after)),
    }
}

/// Whether a log of this name was put aside by `logrotate` or its like, so that nobody writes to it.
pub(super) fn is_rotated(name: &[u8]) -> bool {
    const PACKED: [&[u8]; 5] = [b".gz", b".xz", b".bz2", b".zst", b".old"];
    let dated = |sign: u8| {
        let number = name.rsplit(|byte| *byte == sign).next().unwrap_or_default();
        // "syslog.1" and "syslog-20240131", and not "postgresql-15".
        let digits = !number.is_empty() && number.len() < name.len() && number.iter().all(u8::is_ascii_digit);
        digits && (sign == b'.' || number.len() >= 8)
    };
    PACKED.iter().any(|end| name.ends_with(end)) || dated(b'.') || dated(b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_names() {
        for (pattern, name, expected) in [
            ("ssh_host_*_key", "ssh_host_ed25519_key", true),
            ("ssh_host_*_key", "ssh_host_ed25519_key.pub", false),
            ("*.lease*", "dhclient.eth0.leases", true),
            ("*.lease*", "lease", false),
            ("*", "", true),
            (".*_history", ".bash_history", true),
            (".*_history", "bash_history", false),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn logs_that_were_put_aside_are_known_by_their_names() {
        for name in ["syslog.1", "syslog.2.gz", "messages-20240131", "Xorg.0.log.old", "dmesg.0"] {
            assert!(is_rotated(name.as_bytes()), "{name}");
        }
        for name in ["syslog", "postgresql-15", "12345678", "Xorg.0.log", "a.", "-"] {
            assert!(!is_rotated(name.as_bytes()), "{name}");
        }
    }
}
