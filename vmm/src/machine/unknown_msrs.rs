//! Model-specific registers that faulted under the guest: each is named to a person, once, and not more than a few.

use std::sync::atomic::{AtomicU64, Ordering};

/// Registers that are named: more than any system touches that means well.
const NAMED: usize = 16;
/// Marks a place that is taken, beside the register's number.
const TAKEN: u64 = 1 << 32;

/// Told what a person should know of the guest, on a vCPU's thread. Seldom: see the one who calls.
pub type Warn = Box<dyn Fn(&str) + Send + Sync>;

/// Shared by all vCPUs.
pub struct UnknownMsrs {
    seen: [AtomicU64; NAMED],
    more: AtomicU64,
    warn: Warn,
}

impl UnknownMsrs {
    /// None yet; at most `NAMED` times and once more `warn` is called.
    pub fn new(warn: Warn) -> Self {
        Self { seen: [const { AtomicU64::new(0) }; NAMED], more: AtomicU64::new(0), warn }
    }

    /// The guest got a fault for this one.
    pub fn note(&self, register: u32, write: bool) {
        let mark = TAKEN | u64::from(register);
        for place in &self.seen {
            match place.compare_exchange(0, mark, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    let verb = if write { "wrote" } else { "read" };
                    return (self.warn)(&format!(
                        "the guest {verb} the model-specific register {register:#x}, which it does not have, and got a \
                         fault; said once for each register"
                    ));
                }
                Err(taken) if taken == mark => return,
                Err(_) => {}
            }
        }
        if self.more.swap(1, Ordering::Relaxed) == 0 {
            (self.warn)(
                "the guest touches still more model-specific registers that it does not have; they are counted",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn each_register_is_named_once_and_few_are() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&said);
        let unknown = UnknownMsrs::new(Box::new(move |text: &str| theirs.lock().unwrap().push(text.to_owned())));
        for register in [0, 0xc001_0000, 0, 0xc001_0000] {
            unknown.note(register, register == 0);
        }
        assert_eq!(said.lock().unwrap().len(), 2);
        assert!(said.lock().unwrap()[0].contains("wrote the model-specific register 0x0,"));
        assert!(said.lock().unwrap()[1].contains("read the model-specific register 0xc0010000,"));
        (0..1000).for_each(|register| unknown.note(register, false));
        assert_eq!(said.lock().unwrap().len(), NAMED + 1);
        assert!(said.lock().unwrap()[NAMED].contains("still more"));
    }
}
