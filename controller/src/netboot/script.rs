//! What iPXE is told to do. Every way through a script ends in a boot or in another try, never at a prompt: nobody is there.

use std::net::SocketAddr;

use bedplate_api::Digest;

/// Seconds between tries.
const WAIT: u32 = 5;

/// Where a machine finds its script.
pub fn url(http: SocketAddr, mac: &str) -> String {
    format!("http://{http}/boot/ipxe?mac={mac}")
}

/// What a machine boots.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Digest of the VMM image.
    pub image: Digest,
    /// There is an initial RAM disk.
    pub initrd: bool,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Boots `boot`.
pub fn boot(http: SocketAddr, mac: &str, name: &str, boot: &Boot) -> String {
    let base = format!("http://{http}/boot/{}", boot.image.hex());
    let image = boot.image.short();
    // UEFI kernels look for their RAM disk by the name on the command line.
    let (argument, load) = if boot.initrd {
        ("initrd=initrd ", format!("initrd --name initrd {base}/initrd?mac={mac} || goto retry\n"))
    } else {
        ("", String::new())
    };
    format!(
        "#!ipxe\n\
         echo Bedplate: {name} boots image {image}\n\
         imgfree\n\
         kernel --name kernel {base}/kernel?mac={mac} {argument}{} || goto retry\n\
         {load}\
         boot || goto retry\n\
         :retry\n\
         echo Bedplate: that did not work, next try in {WAIT} seconds\n\
         {}",
        boot.cmdline,
        again(http, mac)
    )
}

/// Says `why` there is nothing to boot, waits, and asks again.
pub fn wait(http: SocketAddr, mac: &str, why: &str) -> String {
    // A line of a script is a command: what is printed must not be able to become one.
    let plain: String = why.chars().filter(|c| c.is_ascii_alphanumeric() || " .,:;-_/()".contains(*c)).collect();
    format!("#!ipxe\necho Bedplate: {plain}\necho Bedplate: next try in {WAIT} seconds\n{}", again(http, mac))
}

/// A failed chain comes back here, so it is tried for ever.
fn again(http: SocketAddr, mac: &str) -> String {
    format!(":again\nsleep {WAIT}\nchain --replace --autofree {} || goto again\n", url(http, mac))
}

/// A command line that survives being part of a script: one line, nothing that iPXE would expand or split.
pub fn cmdline(parts: &[&str]) -> String {
    let words = parts.iter().flat_map(|part| part.split_whitespace());
    words.filter(|word| !word.contains("${") && *word != "||" && *word != "&&").collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http() -> SocketAddr {
        "10.77.0.1:7070".parse().unwrap()
    }

    #[test]
    fn a_boot_script_loads_both_files_and_always_tries_again() {
        let image = Digest::from_bytes([7; 32]);
        let cmdline = cmdline(&["bedplate.slots=8  panic=-1", "", "quiet || ${mac} && x"]);
        assert_eq!(cmdline, "bedplate.slots=8 panic=-1 quiet x");
        let script = boot(http(), "52:54:00:00:00:01", "node-1", &Boot { image, initrd: true, cmdline });
        let base = format!("http://10.77.0.1:7070/boot/{}", image.hex());
        assert!(script.starts_with("#!ipxe\n"));
        assert!(script.contains(&format!("kernel --name kernel {base}/kernel?mac=52:54:00:00:00:01 initrd=initrd bedplate.slots=8 panic=-1 quiet x ||")));
        assert!(script.contains(&format!("initrd --name initrd {base}/initrd?mac=52:54:00:00:00:01 ||")));
        assert!(script.ends_with(
            "chain --replace --autofree http://10.77.0.1:7070/boot/ipxe?mac=52:54:00:00:00:01 || goto again\n"
        ));
    }

    #[test]
    fn a_reason_cannot_become_a_command() {
        let script = wait(http(), "52:54:00:00:00:01", "no image \"vmm\"\nshell ${x} || y");
        assert!(!script.contains("shell ${x}") && !script.lines().any(|line| line.starts_with("shell")));
        assert!(script.contains("echo Bedplate: no image vmmshell x  y\n"));
    }
}
