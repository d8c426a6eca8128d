"""The page in a real browser, on the shipped models and on an engine that does what a test says.

Chromium is the system's; `CHROMIUM` names another. Playwright drives it: `make soak` installs it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from fake_engine import SAID, FakeEngine, language_model, make_app, say, wait, wait_until
from typecheck import unchecked

from openmythos.cli.serve_command import KEY
from openmythos.inference.playground import routes
from openmythos.inference.playground.routes import STATIC, playground
from openmythos.inference.server.run import Process, listen

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SECONDS = 60
"""How long anything on the page may take, on a machine that may be busy."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(autouse=True)
def _no_shape_checks():
    with unchecked():  # the lens' own tests have them
        yield


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: say make soak")
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, BROWSERS)]
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("no browser: install chromium, or set CHROMIUM to its program")
    driver.expect.set_options(timeout=1000 * SECONDS)
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a server; fails if it asks anyone else or breaks its own policy."""
    contexts, problems = [], []

    def look_at(page, address):
        def asked(request):
            if not request.url.startswith(f"{address}/"):
                problems.append(f"asked {request.url}")

        def said(message):
            if "Content Security Policy" in message.text or "Refused" in message.text:
                problems.append(message.text)

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: problems.append(str(error)))

    def open_page(address, *, ready=True, before="", **how):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        contexts.append(context)
        context.set_default_timeout(1000 * SECONDS)
        context.add_init_script(before)
        page = context.new_page()
        look_at(page, address)
        page.goto(f"{address}/")
        if ready:
            expect(page.locator("#write")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def expect(what):
    from playwright.sync_api import expect

    return expect(what)


@contextlib.contextmanager
def process(*flags):
    """`openmythos serve` with the models of the package; yields its address and the process."""
    code = "from openmythos.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as it:
        try:
            line = it.stdout.readline()
            yield re.search(r"http://[\d.:]+", line)[0], it
        finally:
            it.kill()


@pytest.fixture(scope="module")
def shipped():
    with process() as (address, _):
        yield address


class Listening:
    """A server in a thread, whose engine does what the script says."""

    def __init__(self, script, *, room=1000, **how):
        self.engine = FakeEngine(script, room, threads=True)
        how = {"max_length": 64, "routers": [playground("nowhere")], **how}
        app = make_app(self.engine, static=STATIC, **how)
        self.serving, self.socket = app.state.serving, listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        self.process = Process(config, self.serving, lambda: None)
        self.thread = threading.Thread(target=self.process.run, args=([self.socket],))

    def signal(self):
        self.process.handle_exit(signal.SIGTERM, None)


@contextlib.contextmanager
def listening(script=None, **how):
    server = Listening(script or say(), **how)
    server.thread.start()
    try:
        yield server
    finally:
        server.signal()
        server.signal()
        server.thread.join(60)
        assert not server.thread.is_alive()


def talk(run):
    """A script: write until cancelled."""
    token = language_model().tokenizer.encode("the")[0]
    while not run.cancelled.is_set() and run.token(token):
        time.sleep(0.01)
    if 0 in run.open:
        run.finish("cancelled")


def write(page, columns=1):
    """Press the button and wait until every text has been looked into."""
    page.click("#write")
    expect(page.locator("[data-part=experts] table")).to_have_count(columns)


def loops_of(page, column=0):
    """The numbers under the written tokens of a column."""
    tokens = page.locator(".column").nth(column).locator(".token:not(.prompt)")
    return [int(loops) for loops in tokens.evaluate_all("all => all.map(one => one.dataset.loops)")]


def legend_of(page, column=0):
    """How many tokens took how many loops, as the legend says."""
    items = page.locator(".column").nth(column).locator("[data-part=legend] li").all_inner_texts()
    return {int(loops): int(count) for loops, count, *_ in map(str.split, items)}


def overflow(page):
    """By how many pixels the page is wider than the screen."""
    return page.evaluate("() => document.documentElement.scrollWidth - innerWidth")


def test_a_text_streams_in_coloured_and_counted_by_its_loops(visit, shipped):
    page = visit(shipped)
    page.fill("#tokens", "60")
    page.click("#write")
    expect(page.locator(".token:not(.prompt)").nth(2)).to_be_visible()
    assert page.locator(".token:not(.prompt)").count() < 60  # not all at once
    expect(page.locator("[data-part=experts] table")).to_be_visible()
    loops = loops_of(page)
    counts = {number: loops.count(number) for number in sorted(set(loops))}
    assert len(counts) > 1, "the page's first settings show that tokens differ"
    assert legend_of(page) == counts
    said = page.locator("[data-part=status]").inner_text()
    assert said.startswith(f"{len(loops)} tokens in ")
    assert f"{sum(loops) / len(loops):.2f} loops each on average" in said
    told = page.locator("[data-part=histogram]").get_attribute("aria-label")
    for number, count in counts.items():
        assert f"{number} loops: {count} token" in told
    colours = page.locator(".token:not(.prompt)").evaluate_all(
        "all => all.map(one => [one.dataset.loops, getComputedStyle(one).backgroundColor])"
    )
    assert len({colour for _, colour in colours}) == len(set(map(tuple, colours))) == len(counts)


def test_pointing_at_a_token_shows_what_the_lens_sees_there(visit, shipped):
    page = visit(shipped)
    page.fill("#tokens", "12")
    with page.expect_response("**/v1/playground/lens") as answer:
        write(page)
    seen = answer.value.json()
    for number in (1, 9):  # of the prompt, and written
        page.locator(f'.token[data-number="{number}"]').hover()
        place = seen["places"][number - 1 - seen["first"]]
        rows = page.locator(".inside tbody tr")
        expect(rows).to_have_count(place["loops"])
        expect(page.locator(".inside")).to_contain_text("before temperature and filters")
        for row, wanted in zip(rows.all(), place["rows"], strict=True):
            assert row.locator(".number").all_inner_texts() == [
                f"{wanted['loss']:.2f}",
                f"{wanted['entropy']:.2f}",
            ]
            names = row.locator(".chip > :first-child").all_inner_texts()
            wanted_names = [seen["names"][str(token)] for token, _ in wanted["top"]]
            assert [name.strip("·⏎") for name in names] == [name.strip() for name in wanted_names]
            chosen = re.findall(r"\d+", row.locator(".experts-of").inner_text())
            assert sorted(map(int, chosen)) == sorted(
                expert + 1 for layer in wanted["experts"] for expert in layer
            )


def test_the_page_is_used_by_keyboard_alone(visit, shipped):
    page = visit(shipped, reduced_motion="reduce")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # from the prompt that it led to, or to it
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("The President of")
    page.fill("#tokens", "12")
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-part=experts] table")).to_be_visible()
    held = "() => Number(document.activeElement.dataset.number)"
    page.locator("summary").focus()
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate(held):
            break
    steps = [("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 1)]
    for key, number in steps:
        page.keyboard.press(key)
        assert page.evaluate(held) == number
        expect(page.locator(".inside .facts")).to_contain_text(f"token {number} of ")
    page.keyboard.press("End")
    assert page.evaluate(held) == page.locator(".token").count()
    page.keyboard.press("Escape")
    expect(page.locator(".inside .facts")).to_have_count(0)
    page.focus("#walk")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_be_visible()
    page.locator("#house td").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#belief")).to_contain_text("Loop 2, place 2 (red door):")


def test_two_settings_stand_side_by_side_on_one_scale(visit, shipped):
    page = visit(shipped)
    page.fill("#tokens", "15")
    page.check("#compare")
    write(page, columns=2)
    assert set(loops_of(page, 1)) == {1}
    assert min(loops_of(page, 0)) > 1
    boxes = "papers => papers.map(paper => paper.getBoundingClientRect().toJSON())"
    left, right = page.locator(".paper").evaluate_all(boxes)  # at once, as the page may scroll
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    pale = page.locator(".column >> nth=1").locator(".token:not(.prompt)").first
    assert "level-0" in pale.get_attribute("class")  # one loop of the other's twelve
    page.locator(".column >> nth=1").locator(".token").first.hover()
    expect(page.locator(".column >> nth=1").locator(".inside tbody tr")).to_have_count(1)
    page.uncheck("#compare")
    expect(page.locator(".column")).to_have_count(1)


def test_the_reasoner_solves_a_walk_loop_by_loop(visit, shipped):
    page = visit(shipped)
    with page.expect_response("**/v1/playground/walk") as answer:
        page.click("#solve")
    trace = answer.value.json()
    loops, places = len(trace["beliefs"]), len(trace["walk"])
    expect(page.locator("#verdict")).to_contain_text("Right: the walk of 5 doors ends in the ")
    expect(page.locator("#play")).to_have_text("Pause")  # it plays by itself
    expect(page.locator("#shown")).to_contain_text(f"{loops} loops of {loops}:")
    expect(page.locator("#play")).to_have_text("Play")
    assert page.locator("#house td").count() == loops * places
    assert page.locator("#house td.later").count() == 0
    right = sum(
        said == true
        for row in trace["beliefs"]
        for said, true in zip(row, trace["truth"], strict=True)
    )
    assert page.locator("#house .cell.right").count() == right
    page.locator("#loop").fill("1")
    assert page.locator("#house td.later").count() == (loops - 1) * places
    page.locator("#house td").nth(loops + 3).hover()
    expect(page.locator("#belief")).to_have_text("Loop 4, place 2 (red door): not reached yet.")
    page.fill("#walk-hops", "20")
    page.click("#draw")
    expect(page.locator("#house tbody tr")).to_have_count(21)
    widths = page.locator(".marks .cell").evaluate_all("all => all.map((one) => one.offsetWidth)")
    assert len(widths) == 4
    assert min(widths) > 20
    page.fill("#walk", "library puce")
    page.click("#solve")
    expect(page.locator("#walk-problem")).to_contain_text("walk has the word 'puce'")
    expect(page.locator("#walk-result")).to_be_hidden()  # its verdict is of another walk


def test_what_is_told_of_a_cell_follows_the_loops_shown(visit, shipped):
    page = visit(shipped, reduced_motion="reduce")
    page.click("#solve")
    page.locator("#loop").fill("2")
    page.locator("#house td").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#belief")).to_have_text("Loop 5, place 1 (start): not reached yet.")
    page.locator("#loop").fill("5")
    expect(page.locator("#belief")).to_contain_text("Loop 5, place 1 (start): library, right.")
    page.locator("#loop").fill("2")
    page.click("#play")
    expect(page.locator("#belief")).to_contain_text("library, right.")
    page.click("#solve")
    expect(page.locator("#belief")).to_contain_text("Move through the grid")


def test_enter_in_rooms_draws_where_a_walk_is_drawn_and_solves_elsewhere(visit, shipped):
    page = visit(shipped, reduced_motion="reduce")
    page.press("#walk", "Control+Enter")
    expect(page.locator("#house tbody tr")).to_have_count(6)
    for places, field, key in [
        (8, "#walk-hops", "Enter"),
        (10, "#walk-waits", "Enter"),
        (12, "#walk-waits", "Control+Enter"),
    ]:
        page.fill("#walk-hops", "7")
        page.fill("#walk-waits", str(places - 8))
        page.press(field, key)
        expect(page.locator("#house tbody tr")).to_have_count(places)
    page.fill("#walk", "library red")
    page.press("#play", "Control+Enter")
    expect(page.locator("#house tbody tr")).to_have_count(2)
    expect(page.locator("#play")).to_have_text("Play")
    assert page.locator(".token").count() == 0


def test_the_second_setting_alone_is_stopped_when_put_away_and_comes_back_as_it_was(visit):
    with listening(talk, max_length=4096) as server:
        page = visit(server.address)
        page.fill("#tokens", "4000")
        page.check("#compare")
        page.locator("[data-field=temperature]").last.fill("0.35")
        page.click("#write")
        for column in (0, 1):
            tokens = page.locator(".column").nth(column).locator(".token:not(.prompt)")
            expect(tokens.nth(2)).to_be_visible()
        page.uncheck("#compare")
        first, second = sorted(server.engine.runs, key=lambda run: -run.request.thinking.loops)
        assert second.cancelled.wait(SECONDS)
        expect(page.locator(".token:not(.prompt)").nth(len(loops_of(page)) + 5)).to_be_visible()
        assert not first.cancelled.is_set()
        page.click("#stop")
        assert first.cancelled.wait(SECONDS)
        page.check("#compare")
        expect(page.locator("[data-field=temperature]").last).to_have_value("0.35")
        expect(page.locator("[data-part=status]").last).to_contain_text("Stopped.")


def test_write_opens_the_filters_to_show_one_that_cannot_be(visit):
    with listening() as server:
        page = visit(server.address)
        page.click("summary")
        page.fill("[data-field=top_p]", "0")
        for way in ("the button", "Enter in a field"):
            page.click("summary")
            expect(page.locator("[data-field=top_p]")).to_be_hidden()
            if way == "the button":
                page.click("#write")
            else:
                page.press("[data-field=temperature]", "Enter")
            expect(page.locator("[data-field=top_p]")).to_be_focused()
        assert server.engine.runs == []


def test_sampling_may_be_set_as_finely_as_the_server_takes_it(visit):
    wanted = {"temperature": 0.725, "top_p": 0.9955, "min_p": 0.0051}
    with listening() as server:
        page = visit(server.address)
        page.click("summary")
        for name, value in wanted.items():
            page.fill(f"[data-field={name}]", str(value))
        page.press("[data-field=temperature]", "Enter")
        wait_until(lambda: server.engine.runs)
        sampling = server.engine.runs[0].request.sampling
        assert {name: getattr(sampling, name) for name in wanted} == wanted


def test_what_was_not_looked_into_is_told_with_its_reason(visit, monkeypatch):
    monkeypatch.setattr(routes, "MOST_SHOWN", 43)
    held = threading.Event()

    def script(run):
        run.token(language_model().tokenizer.encode("the")[0])
        held.wait(SECONDS)
        say()(run)

    with listening(script) as server:
        page = visit(server.address)
        page.fill("[data-field=loops]", "4")
        page.click("#write")
        page.locator(".token:not(.prompt)").first.hover()
        panel = page.locator(".inside")
        expect(panel).to_contain_text("is shown once the text is complete.")
        held.set()
        told = "Only the last 9 tokens were looked into, at this many loops."
        expect(panel).to_contain_text(told)
        page.locator(".token").nth(-10).hover()
        expect(panel).to_contain_text(told)
        page.locator(".token").nth(-9).hover()
        expect(page.locator(".inside tbody tr")).to_have_count(4)
        captions = page.locator("figcaption")
        expect(captions.nth(1)).to_contain_text("nats, of the last 9 tokens")
        expect(captions.nth(2)).to_contain_text("in per cent, of the last 10 tokens")


def test_a_failed_look_inside_leaves_what_needs_none(visit):
    with listening() as server:
        page = visit(server.address)
        error = {"message": "the lens is broken", "code": None}
        page.route("**/lens", lambda route: route.fulfill(status=500, json={"error": error}))
        assert problem_after_writing(page) == "the lens is broken"
        expect(page.locator("[data-part=histogram] canvas")).to_be_visible()
        assert page.locator("figure:visible").count() == 1
        expect(page.locator(".inside")).to_contain_text("Point at a token")
        page.locator(".token").first.hover()
        expect(page.locator(".inside")).to_contain_text("The model could not be looked into.")
        page.unroute("**/lens")
        write(page)
        assert page.locator("figure:visible").count() == 3


def test_closing_what_is_inside_a_token_leaves_the_focus_on_it(visit):
    with listening() as server:
        page = visit(server.address, viewport={"width": 800, "height": 900})
        write(page)
        page.locator(".token").nth(4).click()
        page.press(".inside .close", "Enter")
        expect(page.locator(".token").nth(4)).to_be_focused()
        expect(page.locator(".inside .facts")).to_have_count(0)


def test_experts_are_coloured_by_the_loops_that_many_tokens_took(visit):
    with listening() as server:
        page = visit(server.address)
        write(page)
        classes = page.evaluate("""async () => {
          const { drawExperts } = await import("/charts.js");
          const row = (...experts) => ({ loss: 1, experts: [experts] });
          const places = Array.from({ length: 40 }, (_, at) => ({ rows: [row(at % 4, at % 5)] }));
          places[0].rows.push(row(0, 0)); // the second loop's one expert has all of it
          const box = document.querySelector("[data-part=experts]");
          drawExperts(box, places, { experts: 5, core_layers: 1 });
          return [...box.querySelectorAll("td[tabindex]")].map((cell) => cell.className);
        }""")
        first, second = classes[:5], classes[5:]
        assert first == ["level-15"] * 4 + ["level-7"]  # 18 of 80 choices each, and 8
        assert second == ["level-15"] + ["level-0"] * 4


@pytest.mark.parametrize("columns", [1, 2])
def test_a_phone_shows_everything_without_scrolling_sideways(visit, shipped, columns):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visit(shipped, **phone, reduced_motion="reduce")
    assert overflow(page) == 0
    page.fill("#tokens", "30")
    if columns == 2:
        page.check("#compare")
    page.click("#write")
    expect(page.locator(".paper").first).to_be_in_viewport()  # it is brought into sight
    expect(page.locator("[data-part=experts] table")).to_have_count(columns)
    page.locator(".token").nth(10).tap()
    expect(page.locator(".inside .facts").first).to_be_in_viewport(ratio=1)
    assert overflow(page) == 0
    page.locator(".inside .close").first.tap()
    expect(page.locator(".inside .facts")).to_have_count(0)
    page.fill("#walk-hops", "24")
    page.tap("#draw")
    expect(page.locator("#house tbody tr")).to_have_count(25)
    assert overflow(page) == 0
    house = page.locator("#house")
    assert house.evaluate("box => box.scrollWidth <= box.clientWidth")  # all loops at once


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_on_every_colour_can_be_read(visit, shipped, scheme):
    page = visit(shipped, color_scheme=scheme)
    page.fill("#tokens", "12")
    write(page)
    page.locator(".token").nth(9).hover()
    page.click("#solve")
    expect(page.locator("#house td").first).to_be_visible()
    poor = page.evaluate(CONTRASTS)
    assert poor == []


CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const rgb = (colour) => parts(colour).slice(0, 3).map((x) => (/srgb/.test(colour) ? x : x / 255));
  const clear = (colour) => colour.includes("rgba") && parts(colour)[3] === 0;
  const ground = (node) => {
    const { backgroundColor } = getComputedStyle(node);
    const through = clear(backgroundColor) && node.parentElement;
    return through ? ground(node.parentElement) : backgroundColor;
  };
  const levels = Array.from({ length: 16 }, (_, level) => {
    const node = document.createElement("span");
    node.className = `level-${level}`;
    node.textContent = String(level);
    document.querySelector("main").append(node);
    return node;
  });
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  const poor = [];
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const text = walk.currentNode.data.trim();
    const { visibility, color } = getComputedStyle(node);
    if (!text || visibility === "hidden" || !node.getClientRects().length) continue;
    if (node.closest(":disabled, option, .hidden")) continue;
    const bar = getComputedStyle(node.closest(".chip") ?? node).backgroundImage.match(/rgb[^)]*/);
    for (const under of [ground(node), ...(bar ?? [])]) {
      const [a, b] = [light(rgb(color)), light(rgb(under))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${node.className}: ${text.slice(0, 20)}`);
    }
  }
  levels.forEach((node) => node.remove());
  return [...new Set(poor)];
}"""


def test_light_and_dark_follow_the_system_until_one_is_chosen(visit, shipped):
    page = visit(shipped, color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_label("Dark").check()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_label("System").check()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("button", ["#stop", "[data-part=stop]"])
def test_stop_ends_the_request_on_the_server(visit, button):
    with listening(talk, max_length=4096) as server:
        page = visit(server.address)
        page.fill("#tokens", "4000")
        page.click("#write")
        expect(page.locator(".token:not(.prompt)").nth(5)).to_be_visible()
        (run,) = server.engine.runs
        assert not run.cancelled.is_set()
        page.click(button)
        assert run.cancelled.wait(SECONDS)
        expect(page.locator("[data-part=status]")).to_contain_text("Stopped.")
        expect(page.locator("#write")).to_be_enabled()
        wait_until(lambda: server.serving.idle)


def test_leaving_the_page_ends_the_request_on_the_server(visit):
    with listening(talk, max_length=4096) as server:
        page = visit(server.address)
        page.fill("#tokens", "4000")
        page.click("#write")
        expect(page.locator(".token:not(.prompt)").first).to_be_visible()
        page.close()
        assert server.engine.runs[0].cancelled.wait(SECONDS)


def problem_after_writing(page):
    page.click("#write")
    problem = page.locator(".column [data-part=problem]")
    expect(problem).to_be_visible()
    expect(page.locator("#write")).to_be_enabled()
    return problem.inner_text()


def test_a_full_queue_is_told_and_one_may_try_again(visit):
    with listening(room=0) as server:
        page = visit(server.address)
        told = problem_after_writing(page)
        assert told == "max_waiting=0 requests wait already: try again later"
        server.engine.room = 1000
        write(page)
        expect(page.locator(".column [data-part=problem]")).to_be_hidden()
        assert page.locator("[data-part=tokens]").inner_text().startswith("The")


def test_a_request_that_cannot_be_is_told_in_the_servers_words(visit):
    with listening() as server:
        page = visit(server.address)
        page.fill("#prompt", "clock " * 62)
        told = problem_after_writing(page)
        assert "must leave room within max_model_len=64" in told
        assert "has 65 tokens" in told


def test_a_server_that_is_being_stopped_is_told(visit):
    with listening(wait) as server:
        page = visit(server.address)
        page.click("#write")
        wait_until(lambda: server.engine.runs)
        server.signal()
        other = visit(server.address, ready=False)
        expect(other.locator("#problem")).to_contain_text("the server is being stopped")
        server.engine.runs[0].finish("stop")
        expect(page.locator("[data-part=status]")).to_contain_text("0 tokens")


def test_an_engine_that_fails_is_told(visit):
    def script(run):
        run.token(language_model().tokenizer.encode("the")[0])
        time.sleep(0.5)
        run.finish("error", error="the disk is full")

    with listening(script) as server:
        page = visit(server.address)
        assert "the disk is full" in problem_after_writing(page)
        assert page.locator(".token:not(.prompt)").count() == 1  # what came stays
        expect(page.locator("[data-part=status]")).to_contain_text("1 token in ")
        expect(page.locator("[data-part=status]")).to_contain_text("It broke off.")
        expect(page.locator("[data-part=histogram] canvas")).to_be_visible()
        page.locator(".token").first.hover()
        expect(page.locator(".inside")).to_contain_text("The model could not be looked into.")


def test_a_stream_that_breaks_off_is_told(visit):
    with process() as (address, it):
        page = visit(address)
        page.fill("#tokens", "900")
        page.fill("[data-field=loops]", "60")
        page.select_option("[data-field=halting]", "none")
        page.click("#write")
        expect(page.locator(".token:not(.prompt)").first).to_be_visible()
        it.kill()
        problem = page.locator(".column [data-part=problem]")
        expect(problem).to_have_text(
            "The connection broke off before the text was finished: is the server still running?"
        )
        expect(page.locator("#write")).to_be_enabled()
        told = problem_after_writing(page)
        assert told == "The server cannot be reached: is it still running?"


def test_a_model_that_is_being_loaded_is_waited_for(visit):
    gate, whole = threading.Event(), Listening(say())

    def load():
        gate.wait(SECONDS)
        return whole.serving._load()

    with listening(load=load) as server:
        page = visit(server.address, ready=False)
        expect(page.locator("#model")).to_have_text("The model is being loaded…")
        expect(page.locator("#write")).to_be_disabled()
        gate.set()
        expect(page.locator("#model")).to_have_text("mouse")
        expect(page.locator("#write")).to_be_enabled()
    whole.socket.close()


def test_a_server_with_a_key_is_asked_with_it(visit, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with listening(api_key="mouse") as server:
        page = visit(server.address, ready=False)
        expect(page.locator("#key")).to_be_visible()
        for unsendable in ("mäuschen", "мышь", "two mice", "  "):
            page.fill("#key-value", unsendable)
            page.keyboard.press("Enter")
            expect(page.locator("#key-note")).to_contain_text("without accents or spaces.")
            expect(page.locator("#key")).to_be_visible()
        page.fill("#key-value", "rat")
        page.keyboard.press("Enter")
        expect(page.locator("#key-note")).to_have_text("The server refused that key. Try again.")
        page.fill("#key-value", "mouse")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("mouse")
        page.fill("#tokens", "9")
        write(page)
        page.reload()  # the tab keeps it
        expect(page.locator("#write")).to_be_enabled()
        other = visit(server.address, ready=False)
        other.click("#key-cancel")
        expect(other.locator("#problem")).to_contain_text("answers only with its key")
        page.evaluate("() => document.getElementById('key').showModal()")
        page.press("#key-value", "Control+Enter")
        expect(page.locator("#stop")).to_be_disabled()  # it wrote nothing


def test_a_key_holds_until_the_page_is_left_where_storage_is_forbidden(visit, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    forbid = """for (const name of ["localStorage", "sessionStorage"]) {
      const get = () => { throw new DOMException("", "SecurityError"); };
      Object.defineProperty(window, name, { get });
    }"""
    with listening(api_key="mouse") as server:
        page = visit(server.address, ready=False, before=forbid)
        page.fill("#key-value", "mouse")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("mouse")
        write(page)


def test_what_a_model_writes_is_text_and_never_markup(visit):
    evil = "<img src=x onerror=p()>&lt;"
    with listening(say(evil)) as server:
        page = visit(server.address)
        page.fill("#prompt", evil)
        page.fill("#tokens", "30")
        write(page)
        text = page.locator("[data-part=tokens]").evaluate("node => node.textContent")
        assert text.startswith(evil + evil)
        assert page.locator("main img").count() == 0


def test_characters_of_several_tokens_and_line_breaks_come_out_whole(visit):
    with listening(say(f"{SAID}\n\n  two — ☃"), max_length=200) as server:
        page = visit(server.address)
        page.fill("#prompt", "Mice: ")
        write(page)
        text = page.locator("[data-part=tokens]").evaluate("node => node.textContent")
        assert text == f"Mice: {SAID}\n\n  two — ☃"


def test_an_installation_without_a_reasoner_says_so(visit):
    with listening() as server:
        page = visit(server.address)
        expect(page.locator("#rooms-missing")).to_contain_text("needs the model “nowhere”")
        expect(page.locator("#rooms-panel")).to_be_hidden()
