//! The machine's power: its key, and its end.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use rustix::system::{RebootCommand, reboot};

use super::console::say;
use super::signals;

/// Size of the kernel's `struct input_event`: two words of time, type, code and value.
const EVENT_LEN: usize = 24;
/// `EV_KEY`.
const KEY_EVENT: u16 = 1;
/// `KEY_POWER`.
const POWER_KEY: u16 = 116;

/// Takes the machine down when its power key is pressed.
pub(super) fn watch_key() {
    // Ctrl-Alt-Del comes to us as a signal instead of resetting the machine under its guests.
    if let Err(e) = reboot(RebootCommand::CadOff) {
        say(&format!("Ctrl-Alt-Del resets this machine at once: {e}"));
    }
    let Ok(entries) = fs::read_dir("/dev/input") else { return };
    let devices = entries.filter_map(|e| e.ok().map(|e| e.path())).filter(is_event);
    for device in devices {
        // A device that cannot be read, or a thread that cannot be had, costs its keys and nothing else.
        let _lost = thread::Builder::new().name("power-key".to_owned()).spawn(move || {
            let Ok(mut device) = File::open(device) else { return };
            let mut event = [0; EVENT_LEN];
            while device.read_exact(&mut event).is_ok() {
                if is_power_press(&event) {
                    say("the power key was pressed");
                    signals::go_down();
                }
            }
        });
    }
}

#[allow(clippy::ptr_arg, reason = "it filters owned paths")]
fn is_event(path: &PathBuf) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("event"))
}

fn is_power_press(event: &[u8; EVENT_LEN]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    let pressed = i32::from_ne_bytes([v0, v1, v2, v3]) == 1;
    u16::from_ne_bytes([t0, t1]) == KEY_EVENT && u16::from_ne_bytes([c0, c1]) == POWER_KEY && pressed
}

/// Ends every process, writes out what is not written, and switches the machine off.
pub(super) fn off() -> ! {
    for (signal, grace) in [(Signal::TERM, Duration::from_secs(1)), (Signal::KILL, Duration::from_millis(200))] {
        // That there is nobody to kill is what is wanted.
        kill_all(signal);
        thread::sleep(grace);
        signals::reap();
    }
    rustix::fs::sync();
    say("off");
    loop {
        if let Err(e) = reboot(RebootCommand::PowerOff) {
            say(&format!("the machine cannot switch itself off: {e}; switch it off by hand"));
        }
        thread::sleep(Duration::from_secs(10));
    }
}

fn kill_all(signal: Signal) {
    // SAFETY: no memory is involved; -1 means every process that we may signal, which for PID 1 excludes itself.
    unsafe { libc::kill(-1, signal.as_raw()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut event = [0; EVENT_LEN];
            event[16..18].copy_from_slice(&kind.to_ne_bytes());
            event[18..20].copy_from_slice(&code.to_ne_bytes());
            event[20..].copy_from_slice(&value.to_ne_bytes());
            event
        };
        assert!(is_power_press(&event(1, 116, 1)));
        for other in [event(1, 116, 0), event(1, 30, 1), event(0, 116, 1), event(1, 116, 2)] {
            assert!(!is_power_press(&other));
        }
    }
}
