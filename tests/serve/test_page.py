"""The chat page in a real browser: typed, streamed, stopped, reloaded, clicked."""
from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from fira.serve.server import PAGE, page_headers

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
SAID = "Größe 🙂 of the Union. "
MARKDOWN = """# Title
One **bold *both*** `a*b*c` [link](https://a.example/b_(c)) [bad](javascript:alert(1)) \\*x\\* snake_case_word

1. first
   - inner **item**
2. second

> quoted
| a | b |
|---|---|
| 1 | **2** |
~~~py
if x:
    y = "<b>**raw**</b>"
~~~
---
end"""
SHOWN = {"h3": 1, "strong": 3, "em": 1, "code": 2, "pre code": 1, "a": 1, "ol > li": 2, "ul > li": 1,
         "blockquote p": 1, "th": 2, "td strong": 1, "hr": 1, "b": 0}


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
    begin(page, engine)
    assert page.locator("#stop").is_visible()
    page.click("#stop")
    assert SAID.startswith(finished(page)[:5])
    page.wait_for_timeout(200)
    assert engine.running == {}


def begin(page, engine, words="Hello"):
    """Send a message whose reply grows slowly."""
    engine.pause = 0.05
    ask(page, words)
    page.wait_for_selector(".reply span:nth-child(3)")


def test_a_reload_keeps_the_question_and_the_growing_reply_which_can_be_continued(
        page, engine, tokenizer):
    begin(page, engine)
    page.reload()
    page.wait_for_selector("text=Try again")
    assert page.locator(".user .text").inner_text() == "Hello"
    assert "The reply is cut" in page.locator(".fault").inner_text()
    cut = page.locator(".reply").inner_text()
    assert cut and SAID.startswith(cut)
    engine.pause = 0
    page.click("text=Continue")
    assert finished(page).startswith(cut + "Größe")  # the fake engine begins anew
    assert tokenizer.decode(engine.asked[-1][0]).endswith(f"assistant\n{cut}")
    page.click("text=Regenerate")
    finished(page)
    assert page.locator(".version").inner_text() == "2 / 2"
    page.click("text=‹")
    assert finished(page).startswith(cut + "Größe")


def test_two_tabs_keep_each_others_conversations_and_a_deleted_one_is_gone_from_both(page):
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#suggestions button")
    for tab, words in ((page, "From one"), (other, "From two")):
        reply_to(tab, words)
    for tab in (page, other):
        assert tab.locator("#conversations li").all_inner_texts() == ["From two", "From one"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.hover("text=From one")
    page.click("[aria-label='Delete From one']")
    other.wait_for_selector("#conversations >> text=From one", state="detached")
    other.reload()
    other.wait_for_selector("text=Regenerate")
    assert other.locator("#conversations li").count() == 1


def answer_with(page, *deltas, end="data: [DONE]\n\n"):
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=body))


def test_a_stream_without_its_end_is_shown_as_cut(page):
    answer_with(page, {"content": "Half"}, end="")
    ask(page, "Hello")
    page.wait_for_selector("text=Continue")
    assert page.locator("text=Try again").count() == 1
    assert page.locator(".fault").inner_text().startswith("The reply is cut. The connection was")


def test_thoughts_are_folded_and_not_sent_back(page, engine, tokenizer):
    answer_with(page, {"reasoning_content": "Well"}, {"reasoning_content": " then."},
                {"content": "Yes."})
    assert reply_to(page, "Hello") == "Yes."
    assert not page.locator(".thoughts p").is_visible()
    page.click("text=Thoughts")
    assert page.locator(".thoughts p").inner_text() == "Well then."
    page.unroute("**/v1/chat/completions")
    reply_to(page, "And?")
    read = tokenizer.decode(engine.asked[-1][0])
    assert "Yes." in read and "Well" not in read


def test_the_reply_goes_on_while_another_conversation_is_open(page, engine):
    settings(page, max_tokens="30")
    begin(page, engine, "First")
    page.click("#new")
    ask(page, "Second")
    for words in ("First", "Second"):
        page.click(f"#conversations >> text={words}")
        assert finished(page) == (SAID * 2)[:len(finished(page))]
        assert "30 tokens" in page.locator(".tools").last.inner_text()


def test_settings_can_be_saved_on_a_small_window_and_reach_the_engine(page, engine, served):
    served.window = 100
    page.reload()
    page.wait_for_selector("#suggestions button")
    values = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
              "frequency_penalty": -0.4}
    settings(page, temperature="0.5", stop="never\\nthere\nUnion", **{
        name: str(value) for name, value in values.items()})
    assert not page.locator("#settings").is_visible()
    assert reply_to(page, "Hello").strip() == "Größe 🙂 of the"
    params = engine.asked[-1][1]
    assert params.temperature == 0.5 and params.stop == ("never\nthere", "Union")
    assert {name: getattr(params, name) for name in values} == values


def test_an_error_after_a_long_paste_is_in_view_and_a_conversation_opens_at_its_end(page):
    ask(page, "word\n" * 600)
    page.wait_for_selector("text=Try again")
    assert "Shorten it" in page.locator(".fault").inner_text()
    for _ in range(2):
        bottom = page.locator("#composer").bounding_box()["y"]
        for place in (".fault", "text=Try again"):
            box = page.locator(place).bounding_box()
            assert 0 < box["y"] and box["y"] + box["height"] <= bottom
        page.reload()
        page.wait_for_selector("text=Try again")


@pytest.mark.parametrize("secure", [True, False])
def test_copy_copies_and_says_so(page, secure):
    reply_to(page, "Hello")
    if secure:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:  # a page without TLS has no clipboard object
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("text=Copy").last.click()
    page.wait_for_selector("text=Copied")
    page.focus("#message")
    page.keyboard.press("Control+V")
    assert page.input_value("#message").startswith(SAID)


def test_markdown_becomes_elements_whose_words_are_tokens(page, engine, tokenizer, served):
    served.window, engine.said = 1000, tokenizer.encode(MARKDOWN)
    page.reload()
    settings(page, max_tokens=str(len(engine.said)))
    reply_to(page, "Hello")
    assert {kind: page.locator(f".reply {kind}").count() for kind in SHOWN} == SHOWN
    assert page.locator(".reply pre").inner_text() == 'if x:\n    y = "<b>**raw**</b>"'
    assert page.locator(".reply a").get_attribute("href") == "https://a.example/b_(c)"
    words = page.locator(".reply > p").first.inner_text()
    assert words == "One bold both a*b*c link [bad](javascript:alert(1)) *x* snake_case_word"
    page.locator(".reply td strong span").click()
    assert page.locator("#token-text").inner_text() == "“2”"
    page.click("#settings-open")
    page.uncheck("[name=markdown]")
    page.click("#settings >> text=Save")
    assert page.locator(".reply").inner_text() == MARKDOWN


def test_conversations_are_renamed_found_exported_and_imported(page, browser, tmp_path):
    reply_to(page, "First words")
    page.click("#new")
    reply_to(page, "Second words")
    page.on("dialog", lambda dialog: dialog.accept("A title"))
    page.hover("#conversations >> text=First words")
    page.click("[aria-label='Rename First words']")
    assert page.locator("#conversations li > :first-child").all_inner_texts() == [
        "Second words", "A title"]
    page.fill("#search", "FIRST")
    assert page.locator("#conversations li").all_inner_texts() == ["A title"]
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "all.json")
    other = browser.new_context().new_page()
    other.goto(page.url)
    other.wait_for_selector("#suggestions button")
    for _ in range(2):  # what is there already stays as it is
        other.set_input_files("#file", tmp_path / "all.json")
        other.wait_for_selector("#notice")
        assert other.locator("#conversations li").count() == 2
    other.click("text=A title")
    assert other.locator(".user .text").inner_text() == "First words"
    (tmp_path / "all.json").write_text('{"conversations": 1}')
    other.set_input_files("#file", tmp_path / "all.json")
    other.wait_for_selector("text=Choose a file that Export wrote")
    other.context.close()


def test_the_list_of_an_earlier_page_is_taken_over(page):
    turns = [{"role": "user", "text": "Old question"}, {"role": "assistant", "text": "Old reply"}]
    old = json.dumps([{"id": "a-1", "title": "Old", "turns": turns}])
    page.evaluate("old => localStorage.setItem('fira.conversations', old)", old)
    page.reload()
    page.click("#conversations >> text=Old")
    assert page.locator(".turn").all_inner_texts()[1].startswith("Old reply")


def test_a_full_storage_is_told(page):
    page.evaluate("""for (let size = 5e6; size >= 1; size /= 2)
        try { localStorage.setItem("x" + size, "x".repeat(size)) } catch {}""")
    ask(page, "Hello")
    page.wait_for_selector("#notice >> text=storage is full")
    finished(page)


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


def test_edited_and_regenerated_turns_are_versions_beside_the_old(page, engine):
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
    page.locator("text=‹").first.click()
    assert page.locator(".user .text").all_inner_texts() == ["First", "Second"]
    assert page.locator(".version").all_inner_texts() == ["1 / 2", "2 / 2"]


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
