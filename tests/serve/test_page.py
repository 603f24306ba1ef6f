"""The chat page in a real browser: typed, streamed, stopped, reloaded, clicked."""
from __future__ import annotations

import os
import re
import shutil

import pytest

from fira.serve.server import PAGE, page_headers

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
SAID = "Größe 🙂 of the Union. "


def test_the_page_names_no_other_place():
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|\bsrc=|innerHTML|outerHTML|insertAdjacent"
                         r"|document\.write|\beval\(| on\w+=\"| style=\"", page)
    policy = page_headers(page)["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium found on the PATH")
    with playwright.sync_playwright() as started:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root cannot have one
        found = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def page(browser, running):
    """A page on the server; its console must stay without errors."""
    context = browser.new_context(viewport={"width": 1300, "height": 800})
    page, faults = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: line.type == "error" and "Failed to load" not in line.text
            and faults.append(line.text))
    page.goto(running.address)
    page.wait_for_selector("#suggestions button")
    yield page
    context.close()
    assert faults == []


def ask(page, words):
    page.fill("#message", words)
    page.keyboard.press("Enter")


def reply_to(page, words):
    ask(page, words)
    return finished(page)


def finished(page):
    page.wait_for_selector(".turn:last-child >> text=Regenerate")
    return page.locator(".reply").last.inner_text()


def settings(page, **values):
    page.click("#settings-open")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.click("#settings >> text=Save")


def test_an_answer_streams_and_survives_a_reload(page, engine):
    settings(page, temperature="0.3", seed="7", max_tokens="17", system="Be brief.")
    assert reply_to(page, "Hello") == SAID.strip()
    params = engine.asked[-1][1]
    assert (params.temperature, params.seed, params.max_new_tokens) == (0.3, 7, 17)
    assert page.locator("#live").inner_text().startswith("Reply: Größe 🙂")
    page.reload()
    page.wait_for_selector("text=Regenerate")
    assert page.locator(".reply").inner_text() == SAID.strip()
    assert page.locator("#conversations li").count() == 1


def test_stop_frees_the_slot_and_keeps_the_words(page, engine):
    engine.pause = 0.05
    ask(page, "Hello")
    page.wait_for_selector(".reply span:nth-child(3)")
    assert page.locator("#stop").is_visible()
    page.click("#stop")
    assert SAID.startswith(finished(page)[:5])
    page.wait_for_timeout(200)
    assert engine.running == {}


def test_a_token_shows_its_details_and_every_control_has_a_name(page):
    reply_to(page, "Hello")
    page.locator(".reply span").first.click()
    assert page.locator("#probability").inner_text() == "probability 60.7 %, the likeliest token"
    assert page.locator("#alternatives li").count() == 8
    assert page.locator("#alternatives li.chosen").count() == 1
    assert page.locator("#map tr").count() == 2
    assert page.locator("#map td.routed").all_inner_texts() == ["1", "2", "1", "2"]
    assert page.locator("#chosen-experts").inner_text() == (
        "Layer 1: experts 1, 2\nLayer 2: experts 3, 4")
    page.locator("#map td").first.click()
    assert page.locator(".reply span.routed").count() == page.locator(".reply span").count()
    page.locator("#map td").nth(2).click()
    assert page.locator(".reply span.routed").count() == 0
    controls = "button, input, textarea, td, aside, nav, dialog"
    nameless = page.evaluate("""controls => [...document.querySelectorAll(controls)]
        .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length
                       || e.getAttribute("aria-labelledby"))).map(e => e.outerHTML)""", controls)
    assert nameless == []


def test_keys_walk_through_tokens_and_map(page):
    reply_to(page, "Hello")
    page.focus(".reply")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator(".reply span.chosen").get_attribute("data-i") == "1"
    page.focus("#map td[tabindex='0']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator("#map td[aria-selected=true]")
    assert chosen.get_attribute("aria-label").startswith("Layer 2, expert 2:")


def test_edit_and_regenerate_replace_what_follows(page, engine):
    reply_to(page, "First")
    reply_to(page, "Second")
    page.locator("text=Regenerate").last.click()
    finished(page)
    assert page.locator(".turn").count() == 4
    page.locator("text=Edit").first.click()
    page.fill(".edit textarea", "Another")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".user .text").all_inner_texts() == ["Another"]
    assert page.locator(".turn").count() == 2


def test_what_the_model_writes_is_never_markup(page, engine, tokenizer):
    evil = "<img src=x onerror=document.title='run'><b>x</b>"
    engine.said = tokenizer.encode(evil)
    settings(page, max_tokens=str(len(engine.said)))
    assert reply_to(page, "<script>document.title='run'</script>") == evil
    assert page.title() == "tiny · FIRA"
    assert page.locator(".turn img, .turn b, .turn script").count() == 0


def test_failures_are_told_and_can_be_tried_again(page, engine):
    engine.fault = "the accelerator ran out of memory"
    ask(page, "Hello")
    page.wait_for_selector("text=Try again")
    assert "the accelerator ran out of memory" in page.locator(".fault").inner_text()
    engine.fault = ""
    page.click("text=Try again")
    assert finished(page).startswith("Größe")
    assert page.locator(".fault").count() == 0


def test_an_old_conversation_drops_its_oldest_turns(page, engine, served):
    settings(page, max_tokens="100")
    for _ in range(3):
        reply_to(page, "word " * 10)
    assert "the oldest 4 messages were left out" in page.locator(".note").last.inner_text()
    assert len(engine.asked[-1][0]) + 100 <= served.window


def test_a_key_is_asked_for(browser, start, served, engine):
    running = start(lambda: (served, engine), keys=["sesame"])
    page = browser.new_page()
    page.goto(running.address)
    page.wait_for_selector("#settings[open]")
    page.fill("[name=key]", "sesame")
    page.click("#settings >> text=Save")
    page.wait_for_selector("#suggestions button")
    page.close()


def test_it_fits_a_phone(browser, running):
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(running.address)
    page.wait_for_selector("#suggestions button")
    reply_to(page, "Hello")
    page.locator(".reply span").first.click()
    page.wait_for_selector("#alternatives li")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    page.keyboard.press("Escape")
    page.click("#menu")
    assert page.locator("#list").is_visible()
    page.close()
