//! Prints what other chunk sizes would cost and save: `cargo run --release -p bedplate-images --example chunk-size -- A B`,
//! with two raw disk images of which the second is a later or slightly different one of the first.
//!
//! One thread, everything in memory. The columns are in `docs/image-format.md`.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bedplate_images::digest_of;
use bedplate_images::frame::is_zero;

/// What storing one image after another costs.
#[derive(Default)]
struct Cost {
    chunks: u64,
    plain: u64,
    stored: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files: Vec<String> = std::env::args().skip(1).collect();
    let [first, second] = files.as_slice() else { return Err("usage: chunk-size A.raw B.raw".into()) };
    let images = [std::fs::read(first)?, std::fs::read(second)?];
    println!(
        "| chunk | A: chunks | A: plain MiB | A: stored MiB | B adds: chunks | B adds: stored MiB | B: index KiB | import MiB/s | one 4 KiB read |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for kib in [16, 32, 64, 128, 256] {
        measure(kib << 10, &images)?;
    }
    Ok(())
}

fn measure(size: usize, images: &[Vec<u8>; 2]) -> std::io::Result<()> {
    let mut seen = HashSet::new();
    let mut costs = [Cost::default(), Cost::default()];
    let mut frames = Vec::new();
    let mut compressor = zstd::bulk::Compressor::new(3)?;
    let start = Instant::now();
    for (image, cost) in images.iter().zip(&mut costs) {
        for chunk in image.chunks(size).filter(|chunk| !is_zero(chunk)) {
            if seen.insert(digest_of(chunk)) {
                let frame = compressor.compress(chunk)?;
                cost.chunks += 1;
                cost.plain += chunk.len() as u64;
                // A file takes whole blocks.
                cost.stored += (frame.len() as u64).next_multiple_of(4096);
                frames.push(frame);
            }
        }
    }
    let import = start.elapsed();
    let read = read_cost(size, &frames)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let plain = mib(costs[0].plain + costs[1].plain);
    println!(
        "| {} KiB | {} | {:.1} | {:.1} | {} | {:.1} | {} | {:.0} | {:.0} µs |",
        size >> 10,
        costs[0].chunks,
        mib(costs[0].plain),
        mib(costs[0].stored),
        costs[1].chunks,
        mib(costs[1].stored),
        (images[1].len().div_ceil(size) * 32) >> 10,
        plain / import.as_secs_f64(),
        read.as_secs_f64() * 1e6,
    );
    Ok(())
}

/// Decompressing and hashing one chunk, which is what a guest's first read in it costs.
fn read_cost(size: usize, frames: &[Vec<u8>]) -> std::io::Result<Duration> {
    let mut plain = vec![0; size];
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let start = Instant::now();
    let mut count = 0;
    for frame in frames.iter().step_by(frames.len() / 1000 + 1) {
        let len = decompressor.decompress_to_buffer(frame, &mut plain[..])?;
        std::hint::black_box(digest_of(&plain[..len]));
        count += 1;
    }
    Ok(start.elapsed() / count.max(1))
}
