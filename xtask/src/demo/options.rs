//! What a person may choose about the demo.

/// How big, and whether to stay.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// End with code 0 as soon as every page has been fetched.
    pub exit_when_ready: bool,
    /// Number of blank machines.
    pub nodes: u8,
    /// VMs on each.
    pub vms_per_node: u8,
}

impl Options {
    /// From the words after `demo`; `None` where they are not understood.
    pub fn parse(words: &[&str]) -> Option<Self> {
        let mut options = Self { exit_when_ready: false, nodes: 2, vms_per_node: 2 };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--exit-when-ready" => options.exit_when_ready = true,
                "--nodes" => options.nodes = number(words.next()?)?,
                "--vms-per-node" => options.vms_per_node = number(words.next()?)?,
                _ => return None,
            }
        }
        Some(options)
    }

    /// VMs in all.
    pub const fn vms(&self) -> usize {
        self.nodes as usize * self.vms_per_node as usize
    }
}

/// What the address plan and a laptop can hold.
fn number(word: &str) -> Option<u8> {
    word.parse().ok().filter(|number| (1..=8).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_options() {
        let options = Options::parse(&["--nodes", "1", "--exit-when-ready"]).unwrap();
        assert_eq!(options, Options { exit_when_ready: true, nodes: 1, vms_per_node: 2 });
        for bad in [&["--nodes"][..], &["--nodes", "0"], &["--nodes", "9"], &["--fast"]] {
            assert_eq!(Options::parse(bad), None, "{bad:?}");
        }
    }
}
