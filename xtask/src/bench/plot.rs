//! `--plot`: the traffic figures as one picture, SVG. Bars are medians of the ratios to host-gw within a round, whiskers
//! their least and greatest.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use super::{
    figures::{Metric, Summary},
    traffic::{Measured, Mode, Row},
    variants::HOST_GW,
};

const METRICS: [(Metric, &str); 5] = [
    (Metric::Tcp1, "TCP, 1 stream: more is better"),
    (Metric::Tcp4, "TCP, 4 streams: more is better"),
    (Metric::Udp64, "UDP 64 B packets/s: more is better"),
    (Metric::CpuPerGb, "CPU per GB: less is better"),
    (Metric::RoundTrip, "round trip p50: less is better"),
];
/// Ratios beyond this are cut, and the bar says so.
const CUT: f64 = 3.0;
const NAMES: f64 = 110.0;
const CHART: f64 = 250.0;
const BAR: f64 = 18.0;
const GAP: f64 = 36.0;
const TOP: f64 = 62.0;

/// Writes the picture to `path`.
pub(super) fn write(path: &Path, traffic: &[Measured]) -> Result<()> {
    fs::write(path, picture(traffic)).with_context(|| format!("write {}", path.display()))
}

fn picture(traffic: &[Measured]) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a few columns and rows")]
    let (columns, heights): (f64, Vec<f64>) = (
        METRICS.len() as f64,
        traffic.iter().map(|measured| TOP + BAR * measured.rows.len() as f64 + GAP).collect(),
    );
    let width = NAMES + columns * (CHART + GAP);
    let height: f64 = heights.iter().sum::<f64>() + 10.0;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="#ffffff"/>
"##
    );
    let mut top = 0.0;
    for (measured, height) in traffic.iter().zip(heights) {
        section(&mut svg, measured, top);
        top += height;
    }
    svg.push_str("</svg>\n");
    svg
}

fn section(svg: &mut String, measured: &Measured, top: f64) {
    let title = match measured.mode {
        Mode::Wire => "On a wire",
        Mode::SuperPackets => "Nodes joined by veth",
    };
    text(
        svg,
        (8.0, top + 22.0),
        "start",
        &format!("{title}: × host-gw, {} rounds, median and range", measured.rounds),
    );
    let rows: Vec<&Row> = measured.rows.iter().collect();
    for (line, row) in rows.iter().enumerate() {
        let tier = if row.path.is_empty() || row.name.ends_with(&row.path) {
            String::new()
        } else {
            format!(" ({})", row.path)
        };
        text(svg, (NAMES - 6.0, line_at(top, line) + 12.0), "end", &format!("{}{tier}", row.name));
    }
    for (column, (metric, title)) in METRICS.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a few columns")]
        let left = NAMES + column as f64 * (CHART + GAP);
        text(svg, (left, top + TOP - 10.0), "start", title);
        let ratios: Vec<Option<Summary>> =
            rows.iter().map(|row| measured.ratio(row, *metric, HOST_GW)).collect();
        let most = ratios.iter().flatten().map(|ratio| ratio.median).fold(1.0, f64::max).min(CUT) * 1.15;
        let scale = CHART / most;
        for (line, (row, ratio)) in rows.iter().zip(&ratios).enumerate() {
            if let Some(ratio) = ratio {
                bar(svg, (left, line_at(top, line)), scale, (most, colour(row.name), *ratio));
            }
        }
        let one = left + scale;
        #[expect(clippy::cast_precision_loss, reason = "a few rows")]
        let bottom = top + TOP + BAR * rows.len() as f64;
        let _ = writeln!(
            svg,
            r##"<line x1="{one:.1}" y1="{:.1}" x2="{one:.1}" y2="{bottom:.1}" stroke="#333333" stroke-dasharray="3 3"/>"##,
            top + TOP
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few rows")]
fn line_at(top: f64, line: usize) -> f64 {
    top + TOP + BAR * line as f64
}

fn bar(svg: &mut String, (left, top): (f64, f64), scale: f64, (most, colour, ratio): (f64, &str, Summary)) {
    let at = |value: f64| left + value.min(most) * scale;
    let middle = top + (BAR - 4.0) / 2.0;
    let _ = writeln!(
        svg,
        r##"<rect x="{left:.1}" y="{top:.1}" width="{:.1}" height="{:.1}" fill="{colour}"/>
<line x1="{:.1}" y1="{middle:.1}" x2="{:.1}" y2="{middle:.1}" stroke="#222222"/>"##,
        at(ratio.median) - left,
        BAR - 4.0,
        at(ratio.least),
        at(ratio.most),
    );
    let cut = if ratio.median > most { " →" } else { "" };
    text(svg, (left + 4.0, top + 11.0), "start", &format!("{:.2}{cut}", ratio.median));
}

fn colour(name: &str) -> &'static str {
    if name.starts_with("udp") { "#7fb8e6" } else { "#d0d0d0" }
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        svg,
        r##"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" fill="#111111">{words}</text>"##
    );
}
