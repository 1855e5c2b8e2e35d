//! Diagram of a start: a lane for each component, with steps as bars and marks as points, labelled where there is room.

use super::{date, exits_of, failure, ms, plain, shortened, shown, summary};
use koya::Timeline;
use koya::timeline::Lane;
use std::fmt::Write;

// All in pixels.
const WIDTH: f64 = 960.0;
/// Start and end of the time scale.
const LEFT: f64 = 110.0;
const RIGHT: f64 = 936.0;
/// End of the background of the lanes.
const LANES_END: f64 = 944.0;
const ROW: f64 = 22.0;
const BAR: f64 = 16.0;
/// Height of title, summary and scale.
const HEAD: f64 = 84.0;
/// Upper bound of a character's width: the viewer chooses the font.
const LETTER: f64 = 6.7;
/// Gap between items of a row.
const GAP: f64 = 6.0;
/// Marks closer than this share a label.
const NEAR: f64 = 5.0;

const MAX_LABEL: usize = 60;
const MAX_NAME: usize = 14;
/// Maximum number of lines of an error, of lines of a guest's console output, and their length in characters.
const MAX_WHAT: usize = 4;
const MAX_SAID: usize = 6;
const LINE: usize = 120;
/// Maximum number of ticks on the scale.
const TICKS: f64 = 10.0;

const RED: &str = "#c62828";

/// Draws a self-contained SVG file.
pub(super) fn draw(timeline: &Timeline) -> String {
    let scale = Scale::of(timeline);
    let lanes = lanes(timeline, &scale);
    let rows: usize = lanes.iter().map(|lane| lane.rows.len()).sum();
    let bottom = HEAD + rows as f64 * ROW + lanes.len() as f64 * GAP;
    let why = reason(timeline);
    let height = bottom + 16.0 + why.len() as f64 * 17.0;

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" \
         font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#fcfcfc\"/>\n"
    );
    let title = shortened(&timeline.id, 80);
    let about = format!("{}: {}", date(timeline.began_unix_ms), summary(timeline));
    put(
        &mut out,
        24.0,
        30.0,
        "font-size=\"17\" font-weight=\"bold\"",
        &title,
    );
    put(&mut out, 24.0, 50.0, "fill=\"#555\"", &about);
    scale.draw(&mut out, bottom);
    let mut y = HEAD;
    for lane in &lanes {
        lane.draw(&mut out, y);
        y += lane.rows.len() as f64 * ROW + GAP;
    }
    if lanes.is_empty() {
        put(
            &mut out,
            LEFT,
            HEAD + 14.0,
            "fill=\"#555\"",
            "nothing is known of it",
        );
    }
    for (index, line) in why.iter().enumerate() {
        let weight = if index == 0 {
            " font-weight=\"bold\""
        } else {
            ""
        };
        let style = format!("fill=\"{RED}\"{weight}");
        put(
            &mut out,
            24.0,
            bottom + 16.0 + index as f64 * 17.0,
            &style,
            line,
        );
    }
    out += "</svg>\n";
    out
}

/// The reason of a failure, wrapped to lines: the error, and the end of the guest's console output.
fn reason(timeline: &Timeline) -> Vec<String> {
    let Some(text) = failure(timeline) else {
        return Vec::new();
    };
    let (what, said) = text.split_once('\n').unwrap_or((&text, ""));
    let mut lines = wrapped(what);
    lines.truncate(MAX_WHAT);
    let said: Vec<String> = said.lines().flat_map(wrapped).collect();
    if said.len() > MAX_SAID {
        lines.push("\u{2026}".into());
    }
    lines.extend_from_slice(&said[said.len().saturating_sub(MAX_SAID)..]);
    lines
}

/// Wraps text between words, or within a word that is too long.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut room = LINE;
    for word in plain(text).split(' ') {
        let letters: Vec<char> = word.chars().collect();
        for part in letters.chunks(LINE) {
            if part.len() >= room && room < LINE {
                lines.push(String::new());
                room = LINE;
            }
            if let Some(line) = lines.last_mut() {
                if room < LINE {
                    line.push(' ');
                    room -= 1;
                }
                line.extend(part);
            }
            room -= part.len();
        }
    }
    lines
}

/// Maps times to coordinates.
struct Scale {
    total_us: u64,
}

impl Scale {
    fn of(timeline: &Timeline) -> Self {
        Self {
            total_us: timeline.total_us().max(1),
        }
    }

    fn x(&self, us: u64) -> f64 {
        let share = us.min(self.total_us) as f64 / self.total_us as f64;
        LEFT + share * (RIGHT - LEFT)
    }

    /// Distance of ticks: 1, 2 or 5 times a power of ten, in microseconds.
    fn tick(&self) -> u64 {
        let least = self.total_us as f64 / TICKS;
        let power = 10f64.powf(least.log10().floor().max(0.0));
        let factors = [1.0, 2.0, 5.0, 10.0].into_iter();
        let mut fitting = factors.map(|f| f * power).filter(|tick| *tick >= least);
        fitting.next().unwrap_or(power * 10.0) as u64
    }

    fn draw(&self, out: &mut String, bottom: f64) {
        let tick = self.tick();
        for number in 0..=self.total_us / tick {
            let (us, x) = (number * tick, self.x(number * tick));
            let shown = match tick % 1000 {
                0 => (us / 1000).to_string(),
                _ => format!("{}", us as f64 / 1000.0),
            };
            let shown = if number == 0 { "0 ms" } else { &shown };
            let top = HEAD - 8.0;
            writeln!(
                out,
                "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\" fill=\"none\"/>"
            )
            .ok();
            put(
                out,
                x,
                top - 4.0,
                "fill=\"#555\" text-anchor=\"middle\"",
                shown,
            );
        }
    }
}

/// An item in a lane, with its label.
struct Item {
    x: f64,
    /// `None` for a point.
    width: Option<f64>,
    label: String,
    /// Start of the label's text.
    label_x: f64,
    is_inside: bool,
    is_failed: bool,
    /// Tooltip.
    details: String,
}

impl Item {
    fn new(x: f64, width: Option<f64>, label: String, details: String) -> Self {
        let label = shortened(&label, MAX_LABEL);
        let text = label.chars().count() as f64 * LETTER;
        let end = x + width.unwrap_or(0.0);
        let is_inside = width.is_some_and(|width| width > text + 2.0 * GAP);
        let label_x = match (is_inside, end + GAP + text < LANES_END - GAP) {
            (true, _) => x + GAP,
            (false, true) => end + GAP,
            (false, false) => (x - GAP - text).max(GAP),
        };
        Self {
            x,
            width,
            label,
            label_x,
            is_inside,
            is_failed: false,
            details,
        }
    }

    /// Horizontal extent that must be kept free.
    fn extent(&self) -> (f64, f64) {
        let text = self.label.chars().count() as f64 * LETTER;
        let end = self.x + self.width.unwrap_or(0.0);
        (
            self.x.min(self.label_x) - GAP,
            end.max(self.label_x + text) + GAP,
        )
    }
}

struct LaneRows {
    name: String,
    color: &'static str,
    rows: Vec<Vec<Item>>,
}

impl LaneRows {
    /// Places an item in the first row with room for it, from `first` on.
    fn place(&mut self, item: Item, first: usize) {
        let (from, to) = item.extent();
        let free = |row: &Vec<Item>| {
            let mut taken = row.iter().map(Item::extent);
            taken.all(|(begin, end)| to <= begin || end <= from)
        };
        match self.rows.iter().skip(first).position(free) {
            Some(row) => self.rows[first + row].push(item),
            None => self.rows.push(vec![item]),
        }
    }

    fn draw(&self, out: &mut String, top: f64) {
        let height = self.rows.len() as f64 * ROW;
        let width = LANES_END - 16.0;
        writeln!(
            out,
            "<rect x=\"16\" y=\"{top}\" width=\"{width}\" height=\"{height}\" rx=\"4\" \
             fill=\"{}\" fill-opacity=\"0.09\"/>",
            self.color
        )
        .ok();
        let style = format!("fill=\"{}\" font-weight=\"bold\"", self.color);
        put(out, 24.0, top + 15.0, &style, &self.name);
        for (index, row) in self.rows.iter().enumerate() {
            let y = top + index as f64 * ROW;
            for item in row {
                self.draw_item(out, item, y);
            }
        }
    }

    fn draw_item(&self, out: &mut String, item: &Item, y: f64) {
        let color = if item.is_failed { RED } else { self.color };
        let details = escaped(&item.details);
        let x = item.x;
        match item.width {
            Some(width) => writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\" \
                 fill=\"{color}\"><title>{details}</title></rect>",
                y + (ROW - BAR) / 2.0
            ),
            None => writeln!(
                out,
                "<path d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"{color}\" stroke-width=\"1.5\">\
                 <title>{details}</title></path>",
                y + 3.0,
                y + ROW - 3.0
            ),
        }
        .ok();
        let style = match (item.is_inside, item.width, item.is_failed) {
            (true, ..) => "fill=\"#fff\"".to_owned(),
            (false, _, true) => format!("fill=\"{RED}\" font-weight=\"bold\""),
            (false, Some(_), _) => String::new(),
            (false, None, _) => "fill=\"#555\"".to_owned(),
        };
        put(out, item.label_x, y + 15.0, &style, &item.label);
    }
}

/// Lane of a step or mark.
fn lane_of(lane: Lane, container: &str) -> (&str, &'static str) {
    match lane {
        Lane::Host => ("host", "#2f6db3"),
        Lane::Kernel => ("guest kernel", "#b35c00"),
        Lane::Agent => ("agent", "#2e7d32"),
        Lane::Container if container.is_empty() => ("container", "#7b4397"),
        Lane::Container => (container, "#7b4397"),
    }
}

/// The lanes in order, then the containers.
fn lanes(timeline: &Timeline, scale: &Scale) -> Vec<LaneRows> {
    let steps = timeline.steps.iter().map(|s| (s.lane, &*s.container));
    let marks = timeline.marks.iter().map(|m| (m.lane, &*m.container));
    let mut keys: Vec<(Lane, &str)> = Vec::new();
    for key in steps.chain(marks) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.sort_by_key(|(lane, _)| *lane);
    keys.into_iter()
        .map(|key| lane_rows(timeline, scale, key))
        .collect()
}

fn lane_rows(timeline: &Timeline, scale: &Scale, key: (Lane, &str)) -> LaneRows {
    let (name, color) = lane_of(key.0, key.1);
    let mut rows = LaneRows {
        name: shortened(name, MAX_NAME),
        color,
        rows: Vec::new(),
    };
    let own = timeline
        .steps
        .iter()
        .filter(|s| (s.lane, &*s.container) == key);
    for step in own {
        let (from, to) = (step.from_us, step.to_us.unwrap_or(scale.total_us));
        let took = match step.to_us {
            Some(_) => format!("{} ms", ms(to.saturating_sub(from))),
            None => "not ended".into(),
        };
        let mut label = format!("{} {took}", step.name);
        if step.error.is_some() {
            label = format!("{label}, failed");
        }
        if let Some(exits) = exits_of(timeline, step) {
            label = format!("{label}, {exits}");
        }
        let details = format!("{}: {took} from {} ms", step.name, ms(from));
        let x = scale.x(from);
        let width = (scale.x(to) - x).max(1.5);
        // An item of zero length at the very end is drawn as well.
        let mut item = Item::new(x.min(RIGHT - width), Some(width), label, details);
        item.is_failed = step.error.is_some();
        rows.place(item, 0);
    }
    let first = rows.rows.len();
    let own = timeline
        .marks
        .iter()
        .filter(|m| (m.lane, &*m.container) == key);
    let mut groups: Vec<(f64, Vec<_>)> = Vec::new();
    for mark in own {
        let x = scale.x(mark.at_us);
        match groups.last_mut() {
            Some((begin, group)) if x - *begin < NEAR => group.push(mark),
            _ => groups.push((x, vec![mark])),
        }
    }
    for (x, group) in groups {
        let names: Vec<&str> = group.iter().map(|mark| &*mark.name).collect();
        let times: Vec<_> = group
            .iter()
            .map(|mark| format!("{} at {} ms", mark.name, ms(mark.at_us)))
            .collect();
        rows.place(
            Item::new(x, None, names.join(", "), times.join("\n")),
            first,
        );
    }
    rows
}

fn put(out: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = escaped(text);
    writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>").ok();
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\n' => out.push('\n'),
            c => out.push(shown(c)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::{empty, failed, mark, step, timeline};
    use super::*;

    /// Values of an attribute in all elements of a kind.
    fn numbers(svg: &str, element: &str, attribute: &str) -> Vec<f64> {
        let begin = format!("<{element} ");
        let own = svg.split(&begin).skip(1).filter_map(|rest| {
            let (inside, _) = rest.split_once('>')?;
            let inside = format!(" {inside}");
            let (_, value) = inside.split_once(&format!(" {attribute}=\""))?;
            value.split('"').next()?.parse().ok()
        });
        own.collect()
    }

    fn check_bounds(timeline: &Timeline) {
        let svg = draw(timeline);
        let height = numbers(&svg, "svg", "height")[0];
        // The background has no coordinates.
        let widths = numbers(&svg, "rect", "width");
        for (x, width) in numbers(&svg, "rect", "x").iter().zip(&widths[1..]) {
            assert!(*x >= 0.0 && x + width <= WIDTH, "{x} {width}\n{svg}");
        }
        for y in numbers(&svg, "rect", "y")
            .iter()
            .chain(&numbers(&svg, "text", "y"))
        {
            assert!(*y > 0.0 && *y < height, "{y} of {height}\n{svg}");
        }
        for x in numbers(&svg, "text", "x") {
            assert!((0.0..WIDTH).contains(&x), "{x}\n{svg}");
        }
    }

    #[test]
    fn nothing_is_outside_the_picture() {
        check_bounds(&timeline());
        check_bounds(&failed());
        check_bounds(&empty());
        let mut odd = timeline();
        odd.steps
            .push(step("late", Lane::Container, 130_100, 130_100));
        odd.steps.push(step("backwards", Lane::Host, 90_000, 10));
        odd.steps[3].to_us = None;
        odd.marks.push(mark("end", Lane::Agent, 130_100));
        check_bounds(&odd);
        odd.steps[0].to_us = Some(u64::MAX);
        check_bounds(&odd);
    }

    #[test]
    fn things_in_a_row_keep_apart() {
        let mut crowded = timeline();
        for number in 0..40 {
            let at = 20_000 + number * 1_500;
            crowded
                .marks
                .push(mark("something of note", Lane::Kernel, at));
        }
        let scale = Scale::of(&crowded);
        for lane in lanes(&crowded, &scale) {
            for row in &lane.rows {
                let mut extents: Vec<_> = row.iter().map(Item::extent).collect();
                extents.sort_by(|a, b| a.0.total_cmp(&b.0));
                let apart = extents.windows(2).all(|two| two[0].1 <= two[1].0);
                assert!(apart, "{}: {extents:?}", lane.name);
            }
        }
    }

    #[test]
    fn marks_beside_each_other_have_one_label() {
        let svg = draw(&timeline());
        assert!(svg.contains(">virtio-vsock, virtio-fs</text>"), "{svg}");
        assert!(svg.contains("virtio-fs at 90.1 ms"), "{svg}");
        let kernel = "kernel 86.2 ms, 112 port exits, 270 MMIO exits";
        assert!(svg.contains(kernel), "{svg}");
    }

    #[test]
    fn labels_are_text_and_nothing_else() {
        let mut timeline = failed();
        timeline.id = "<script>\"&\x1b".into();
        let svg = draw(&timeline);
        assert!(svg.contains("&lt;script&gt;&quot;&amp;\u{b7}"), "{svg}");
        assert!(svg.contains("&lt;panic&gt; &amp; \u{b7}[2J more"), "{svg}");
        assert!(!svg.contains("<script") && !svg.contains('\x1b'));
        assert!(svg.contains(&format!("fill=\"{RED}\"")), "{svg}");
    }

    #[test]
    fn a_long_reason_is_cut() {
        let mut timeline = failed();
        let said: String = (0..50).map(|number| format!("line {number}\n")).collect();
        timeline.steps[3].error = Some(format!("{}\n{said}", "x".repeat(10_000)));
        let lines = reason(&timeline);
        assert_eq!(lines.len(), MAX_WHAT + 1 + MAX_SAID);
        assert!(lines.iter().all(|line| line.chars().count() <= LINE));
        assert_eq!(lines.last().map(String::as_str), Some("line 49"));
        check_bounds(&timeline);
    }

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrapped("a bc"), ["a bc"]);
        let word = "w".repeat(LINE / 2);
        assert_eq!(
            wrapped(&format!("{word} {word} a")),
            [word.clone(), format!("{word} a")]
        );
        let long = "l".repeat(LINE + 1);
        assert_eq!(wrapped(&format!("a {long}")), ["a", &long[1..], "l"]);
        assert_eq!(wrapped(""), [""]);
    }

    #[test]
    fn ticks_are_round_and_few() {
        for total_us in [1, 7, 999, 1000, 130_100, 61_000_000, u64::MAX / 2] {
            let tick = Scale { total_us }.tick();
            assert!(
                tick >= 1 && total_us / tick <= TICKS as u64,
                "{total_us}: {tick}"
            );
        }
        assert_eq!(Scale { total_us: 130_100 }.tick(), 20_000);
    }
}
