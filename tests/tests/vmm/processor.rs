//! What processor the guest has: baselines, what they hide and how, and the time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use serde_json::{Value, json};

/// What Linux shows of `x86-64-v2` on AMD's processors: our list, as far as Linux has names for it in this line;
const V2: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 \
     syscall nx rdtscp lm pni ssse3 cx16 sse4_1 sse4_2 x2apic popcnt tsc_adjust lahf_lm";
/// what a VM has whatever its processor is, and AMD's word for how leaves tell of caches;
const ANY: &str = "tsc_deadline_timer hypervisor arat topoext";
/// what Linux adds by itself: for the maker, and for having looked at `CPUID`.
const LINUX_ADDS: &str = "3dnowprefetch rep_good nopl cpuid extd_apicid tsc_known_freq vmmcall";
/// What `x86-64-v3` has beside,
const V3: &str = "pclmulqdq movbe aes f16c rdrand fsgsbase bmi1 smep bmi2 abm pdpe1gb";
/// and what Linux only shows where `XSAVE` works: not under emulation (docs/lab.md).
const V3_XSAVE: &str = "xsave xsaveopt avx avx2 fma";
/// `x86-64-v4`, beside that.
const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

fn spec(name: &str, baseline: Option<&str>) -> GuestSpec {
    let mut machine = json!({"vcpu_count": 1, "mem_size_mib": 256});
    if let Some(baseline) = baseline {
        machine["cpu_baseline"] = json!(baseline);
    }
    GuestSpec::new(name).section("machine-config", machine)
}

/// What the node's VMM says of each baseline.
fn offered() -> Result<Vec<(String, String)>> {
    let output = Command::new("/bin/bedplate-vmm").arg("--cpu-baselines").output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "--cpu-baselines failed: {}", String::from_utf8_lossy(&output.stderr));
    let line = |line: &str| line.split_once("  ").map(|(name, said)| (name.to_owned(), said.to_owned()));
    text.lines().map(|text| line(text).with_context(|| format!("{text:?} is no line of --cpu-baselines"))).collect()
}

fn flags(guest: &Guest) -> Result<BTreeSet<String>> {
    let line = guest.run("grep -m 1 ^flags /proc/cpuinfo | cut -d : -f 2")?;
    Ok(line.split_whitespace().map(str::to_owned).collect())
}

/// Every baseline that this node can give has its flags and no others; the others are refused.
pub fn baselines() -> Result<()> {
    let offered = offered()?;
    let names: Vec<_> = offered.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == ["x86-64-v2", "x86-64-v3", "x86-64-v4"], "--cpu-baselines says {names:?}");
    ensure!(offered[0].1 == "yes", "{offered:?}");
    let plain = spec("plain", None).boot()?;
    let xsave = if flags(&plain)?.contains("xsave") { V3_XSAVE } else { "" };
    let host = fs::read_to_string("/proc/cpuinfo")?;
    let host = host.lines().find(|line| line.starts_with("model name")).context("the node's processor has no name")?;
    let model = plain.run("grep -m 1 '^model name' /proc/cpuinfo")?;
    ensure!(model == host, "{model:?} on {host:?}");
    drop(plain);
    for (name, said) in &offered {
        let Some(missing) = said.strip_prefix("no: this host lacks ") else {
            let guest = spec("baseline", Some(name)).boot()?;
            let more = match name.as_str() {
                "x86-64-v2" => ["", "", ""],
                "x86-64-v3" => [V3, xsave, ""],
                _ => [V3, xsave, V4],
            };
            let lists = [V2, ANY, LINUX_ADDS].into_iter().chain(more);
            let expected: BTreeSet<_> = lists.flat_map(str::split_whitespace).map(str::to_owned).collect();
            let flags = flags(&guest)?;
            let (more, less): (Vec<_>, Vec<_>) =
                (flags.difference(&expected).collect(), expected.difference(&flags).collect());
            ensure!(more.is_empty() && less.is_empty(), "{name}: beyond the list {more:?}, not there {less:?}");
            let model = guest.run("grep -m 1 '^model name' /proc/cpuinfo")?;
            ensure!(model.ends_with(&format!("Virtual {name} processor")), "{model}");
            continue;
        };
        let refused = spec("no-baseline", Some(name)).refused()?;
        ensure!(refused.contains(missing) && refused.contains("the best that it has"), "{refused:?}, {missing:?}");
    }
    let refused = spec("unknown", Some("x86-64-v9")).refused()?;
    ensure!(refused.contains("x86-64-v9") && refused.contains("x86-64-v3"), "{refused}");
    Ok(())
}

/// Firecracker's names of processors are for some models. On one of them the guest has the name's signature, and lacks what the name
/// hides; on others there is no VM.
pub fn templates() -> Result<()> {
    let host = fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| host.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix(": "));
    let (vendor, family, model) = (field("vendor_id"), field("cpu family"), field("model\t"));
    let is_milan = (vendor, family, model) == (Some("AuthenticAMD"), Some("25"), Some("1"));
    for (name, fits) in [("T2S", false), ("T2A", is_milan)] {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 256, "cpu_template": name});
        let spec = GuestSpec::new(&name.to_lowercase()).section("machine-config", machine);
        if !fits {
            let refused = spec.refused()?;
            ensure!(refused.contains(&format!("cpu_template {name} is for ")), "{refused}");
            continue;
        }
        let guest = spec.boot()?;
        let there = guest.run(
            "grep -m 3 -E '^(cpu family|model|stepping)[[:space:]]*:' /proc/cpuinfo | grep -o '[0-9]*$' | tr '\\n' ' '",
        )?;
        ensure!(there == "6 63 2", "{there:?} is not Haswell's");
        let flags = flags(&guest)?;
        let hidden = ["svm", "sse4a", "mmxext", "clzero", "rdseed", "adx", "clflushopt", "pdpe1gb", "umip"];
        ensure!(hidden.iter().all(|name| !flags.contains(*name)) && flags.contains("bmi2"), "{flags:?}");
    }
    Ok(())
}

/// A program of one page that executes `code` and ends with 0.
fn program(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 0x40_0000;
    let headers = 64 + 56;
    // ELF64, little endian, executable, x86-64; one program header, behind this one.
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend((ADDRESS + headers).to_le_bytes());
    elf.extend(64u64.to_le_bytes());
    elf.extend(0u64.to_le_bytes());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // Loaded whole, to be read and executed.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend([0, ADDRESS, ADDRESS, 0x1000, 0x1000, 0x1000].map(u64::to_le_bytes).as_flattened());
    elf.extend(code);
    elf.extend([0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05]); // xor edi, edi; mov eax, 60; syscall
    elf.resize(0x1000, 0);
    elf
}

/// A disk that holds `bytes` from its start.
fn disk(name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = Path::new("/run").join(name);
    fs::write(&path, bytes)?;
    fs::File::options().write(true).open(&path)?.set_len((bytes.len() as u64).next_multiple_of(4096))?;
    Ok(path)
}

/// The kernel's module for reading model-specific registers, brought to the node for its guests.
fn msr_module() -> Result<Vec<u8>> {
    let found =
        fs::read_dir("/modules")?.flatten().find(|entry| entry.file_name().to_string_lossy().ends_with("-msr.ko"));
    Ok(fs::read(found.context("the node has no module msr")?.path())?)
}

/// Whether the guest can read a register whose number is a multiple of 8.
fn can_read(guest: &Guest, register: u32) -> Result<bool> {
    let (skip, word) = (register / 8, "dd if=/dev/cpu/0/msr bs=8 count=1 of=/tmp/value");
    let (printed, code) = guest.try_run(&format!("{word} skip={skip} 2>&1"))?;
    match (code.as_str(), printed.contains("Input/output error")) {
        ("0", _) => Ok(true),
        (_, true) => Ok(false),
        _ => bail!("reading register {register:#x} ended with {code}: {printed}"),
    }
}

/// Instructions whose state is hidden fault, and registers that are not listed do, though KVM has them.
pub fn hidden_faults() -> Result<()> {
    const ILLEGAL: &str = "132";
    let module = msr_module()?;
    let avx = program(&[0xc5, 0xfc, 0x57, 0xc0]); // vxorps ymm0, ymm0, ymm0
    let base = program(&[0xf3, 0x48, 0x0f, 0xae, 0xc0]); // rdfsbase rax
    let programs = disk("programs", &[avx, base].concat())?;
    let msr = disk("msr", &module)?;
    let boot = |name: &str, baseline| -> Result<Guest> {
        let guest =
            spec(name, baseline).drive(&programs, true).drive(&msr, true).options(&["--level", "Info"]).boot()?;
        guest.run(&format!("head -c {} /dev/vdb > /tmp/msr.ko && insmod /tmp/msr.ko", module.len()))?;
        for (number, name) in ["avx", "base"].iter().enumerate() {
            guest.run(&format!("dd if=/dev/vda of=/tmp/{name} bs=4096 count=1 skip={number} 2>/dev/null"))?;
            guest.run(&format!("chmod 755 /tmp/{name}"))?;
        }
        guest.run("until [ -e /dev/cpu/0/msr ]; do usleep 10000; done")?;
        Ok(guest)
    };
    // Counters of AMD, which KVM answers for with zeroes where there are none; features that software turns on.
    const COUNTER: u32 = 0xc001_0000;
    const FEATURES: u32 = 0x140;
    let plain = boot("plain", None)?;
    ensure!(plain.try_run("/tmp/base")?.1 == "0", "what the baseline hides does not work anyway");
    let has_avx = flags(&plain)?.contains("avx");
    ensure!(has_avx == (plain.try_run("/tmp/avx")?.1 == "0"), "AVX works where it should not, or the other way round");
    ensure!(can_read(&plain, COUNTER)? && can_read(&plain, FEATURES)?, "what the baseline hides is not there anyway");
    ensure!(!flags(&plain)?.contains("perfctr_core"), "the host's counters are shown");

    let guest = boot("hidden", Some("x86-64-v2"))?;
    for name in ["avx", "base"] {
        let (printed, code) = guest.try_run(&format!("/tmp/{name}"))?;
        ensure!(code == ILLEGAL, "{name} is not hidden: it ended with {code}: {printed}");
    }
    let before = unknown(&guest)?;
    ensure!(!can_read(&guest, COUNTER)? && can_read(&guest, FEATURES)?);
    ensure!(unknown(&guest)? == before + 1, "the register is not counted: {before} before");
    ensure!(!can_read(&guest, COUNTER)?);
    let said = fs::read_to_string(guest.file("stderr"))?;
    ensure!(said.matches("register 0xc0010000,").count() == 1, "it was not named once: {said}");
    Ok(())
}

fn unknown(guest: &Guest) -> Result<u64> {
    let status: Value = serde_json::from_str(&guest.api("GET", "/bedplate/status", "", 200)?)?;
    status["exits"]["unknown_msr"].as_u64().context("no count of registers")
}

/// The guest knows what time it is, from KVM's clock.
pub fn clock() -> Result<()> {
    let guest = GuestSpec::new("clock").boot()?;
    let source = guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(source == "kvm-clock", "the guest's clock is {source}");
    // "now at N nsecs", by the clock that counts from the start, and what is added to it: ".offset: N nsecs" of each of the
    // clocks, the second of which is the time of day.
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let before = now()?;
    let timers = guest.run("grep -E 'now at|offset' /proc/timer_list")?;
    let after = now()?;
    let mut numbers = timers.split_ascii_whitespace().filter_map(|word| word.parse().ok());
    let (Some(up), Some(_), Some(offset)) = (numbers.next(), numbers.next(), numbers.next()) else {
        bail!("not a list of timers: {timers}");
    };
    let guests = Duration::from_nanos(up) + Duration::from_nanos(offset);
    // Linux takes the time from the clock with a battery, which knows whole seconds, and adds a half; a tenth more if it was
    // held up between the two.
    let half = Duration::from_millis(500);
    let held_up = Duration::from_millis(100);
    let range = before - half - held_up..=after + half;
    ensure!(range.contains(&guests), "{guests:?} is not around {before:?} to {after:?}");
    Ok(())
}
