"""The search page in a real browser: one Chromium and one served gallery for all tests."""

import importlib.util, os, re, urllib.parse, zipfile
from pathlib import Path

import pytest
from PIL import Image

from gallery_pictures import figure
from test_app import free_port
from tipr_nb.search import ColourModel, find_chromium, Gallery, serve
from tipr_nb.search import HitProbabilities
from tipr_nb.search.app import fitting_sentences

SENTENCE = "a red coat and blue trousers"
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
DESK = (1280, 800)
PHONE = (390, 844)
EVERY_WIDTH = [PHONE, (800, 700), (1024, 700), DESK]


def scenes(folder: Path):
    "Photos of three people each, and a table of their boxes: 45 people, three cameras."
    pairs = [(coat, legs) for coat in COLOURS for legs in COLOURS]
    pairs += pairs[9:18]
    lines = ["path,x0,y0,x1,y1,camera,day"]
    for i in range(15):
        scene = Image.new("RGB", (360, 200), (150, 160 + i, 150))
        camera = f"c{1 + i % 3}"
        for j, (coat, legs) in enumerate(pairs[3 * i : 3 * i + 3]):
            left = 30 + 110 * j
            scene.paste(figure(coat, legs), (left, 60 + 10 * j))
            box = f"{left},{60 + 10 * j},{left + 48},{156 + 10 * j}"
            lines.append(f"scene{i:02d}.png,{box},{camera},{1 + i % 5}")
        scene.save(folder / f"scene{i:02d}.png")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    home = tmp_path_factory.mktemp("page")
    (home / "photos").mkdir()
    scenes(home / "photos")
    boxes = home / "photos" / "boxes.csv"
    found = Gallery.build(home / "photos", ColourModel(), home / "g", boxes=boxes)
    known = HitProbabilities(
        found.manifest["fingerprint"], "coloured figures", 0.5, [8.0, 0.0], 0.0, [0.9, 0], [0.1, 1]
    )
    known.save(home / "g" / "calibration.json")
    found = Gallery(home / "g", ColourModel())
    assert len(found) == 45
    return found


@pytest.fixture(scope="module")
def address(gallery):
    blocks, address = serve(gallery, port=free_port(), wait=False)
    yield address.rstrip("/")
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


class Walk:
    "A reader in front of the page."

    def __init__(self, browser, address, size=DESK, dark=False, link=""):
        theme = "dark" if dark else "light"
        width, height = size
        self.context = browser.new_context(
            viewport=dict(width=width, height=height), color_scheme=theme
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.height = height
        self.outside, self.errors = [], []
        own = (address, "data:", "blob:", address.replace("http", "ws"))
        self.page.on(
            "request", lambda r: None if r.url.startswith(own) else self.outside.append(r.url)
        )
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(address + "/" + link)
        self.page.wait_for_selector("#q textarea")

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        self.context.close()
        if kind is None:
            assert not self.outside and not self.errors

    def ask(self, sentence=SENTENCE):
        self.page.fill("#q textarea", sentence)
        self.page.press("#q textarea", "Enter")
        self.said("of 45 people")
        self.page.wait_for_selector("#people button img")

    def said(self, words):
        self.page.wait_for_function(
            "words => (document.querySelector('#note') || {innerText: ''}).innerText.includes(words)",
            arg=words,
        )

    def note(self):
        return self.page.inner_text("#note")

    def tiles(self):
        return [
            t.replace("\n", " · ") for t in self.page.locator("#people button").all_inner_texts()
        ]

    def open(self, i=0):
        tile = self.page.locator("#people button").nth(i)
        score = tile.inner_text().split()[1]
        tile.click()
        self.page.wait_for_selector(f"#closer .facts td:text-is('{score}')")
        self.page.wait_for_selector("#original:not([disabled])")

    def resize(self, size):
        self.page.set_viewport_size(dict(width=size[0], height=size[1]))
        self.height = size[1]

    def visible(self, selector):
        box = self.page.locator(selector).bounding_box()
        return (
            box is not None and box["y"] >= 0 and box["y"] + 40 <= self.height and box["width"] > 30
        )

    def closed(self):
        self.page.wait_for_selector("#closer", state="hidden")

    def fits(self):
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_enter_searches_and_the_address_follows(browser, address, size):
    with Walk(browser, address, size) as w:
        assert "45 people in this gallery" in w.note() and w.fits()
        w.ask()
        assert "24 of 45 people, best first" in w.note()
        assert any(
            Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.webp")
        )  # thumbnails, in a private folder
        best, *others = w.tiles()
        assert re.match(r"score 1\.000 · probability 1\.00 · camera c\d · day \d", best)
        assert len(others) == 23 and all(re.match(r"score 0?-?\d?\.", t) for t in others)
        w.page.wait_for_function("location.search.includes('red+coat')")
        assert w.fits()
        if size == PHONE:  # what was found comes into view by itself
            w.page.wait_for_function(
                "document.querySelector('#note').getBoundingClientRect().y < 60"
            )


def test_details_are_in_view_at_every_width(browser, address):
    with Walk(browser, address) as w:
        w.ask()
        for size in EVERY_WIDTH:
            w.resize(size)
            w.open(5)
            w.page.locator("#closer [role=tab]", has_text="Person").click()
            w.page.wait_for_selector("#heat img[alt]")
            assert w.visible("#person img") and w.visible("#close") and w.fits()
            assert all(w.visible(f"#{name}") for name in ("more_like", "pick", "original"))
            facts = w.page.inner_text("#closer")
            assert all(word in facts for word in ("probability", "scene", "camera", "box"))
            for tab, name in (("Around", "near"), ("Photo", "whole")):
                w.page.locator("#closer [role=tab]", has_text=tab).click()
                w.page.wait_for_selector(f"#{name} img[alt]:not([alt=''])")
                assert w.visible(f"#{name} img")
            whole = "(i => [i.naturalWidth, i.naturalHeight])(document.querySelector('#whole img'))"
            assert w.page.evaluate(whole) == [360, 200]
            w.page.keyboard.press("Escape")
            w.closed()


def test_the_original_is_the_photo_itself(browser, address, gallery):
    with Walk(browser, address) as w:
        w.ask()
        w.open()
        with w.page.expect_download() as found:
            w.page.click("#original")
        hit = gallery.search(SENTENCE, k=1)[0]
        assert found.value.suggested_filename == hit.path.name
        assert Path(found.value.path()).read_bytes() == hit.path.read_bytes()


def exported(w, kind):
    "A file of an export, as it is handed out."
    w.page.click(f"#export_{kind}")
    w.page.wait_for_selector(f"#file a[href*='people.{kind}']")
    with w.page.expect_download() as found:
        w.page.locator(f"#file a[href*='people.{kind}']").first.click()
    return Path(found.value.path())


def test_selecting_and_exporting(browser, address):
    with Walk(browser, address) as w:
        w.ask()
        assert "Export all 24 people shown" in w.page.inner_text("#take")
        for i in (1, 3):
            w.open(i)
            w.page.click("#pick")
            w.page.wait_for_selector(f"#people .gallery-item:nth-child({i + 1}) .picked")
            assert w.page.inner_text("#pick") == "Unselect"
        assert "Export the 2 people selected" in w.page.inner_text("#take")
        table = exported(w, "csv").read_text().splitlines()
        assert len(table) == 3 and "probability" in table[0] and "camera" in table[0]
        html = exported(w, "html").read_text()
        assert html.count("<figure>") == 2 and SENTENCE in html and "probability" in html
        names = zipfile.ZipFile(exported(w, "zip")).namelist()
        assert {"hits.csv", "hits.html"} < set(names) and sum(
            n.endswith(".png") for n in names
        ) == 2
        w.page.click("#next")  # the choice stays while the pages turn
        w.said("from rank 25")
        assert "Export the 2 people selected" in w.page.inner_text("#take")
        assert w.page.locator("#people .picked").count() == 0
        w.page.click("#back")
        w.page.wait_for_function("document.querySelectorAll('#people .picked').length === 2")
        w.page.click("#nobody")
        w.page.wait_for_function("document.querySelectorAll('#people .picked').length === 0")
        assert "Export all 24" in w.page.inner_text("#take")


def test_pages_turn(browser, address):
    with Walk(browser, address) as w:
        w.ask()
        first = w.tiles()
        assert not w.page.is_visible("#back")
        w.page.click("#next")
        w.said("from rank 25")
        assert len(w.tiles()) == 21 and not w.page.is_visible("#next") and first != w.tiles()
        w.page.wait_for_function("location.search.includes('page=1')")
        w.page.click("#back")
        w.page.wait_for_function("!document.querySelector('#note').innerText.includes('from rank')")
        assert w.tiles() == first


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_more_like_this_and_the_way_back(browser, address, size):
    with Walk(browser, address, size) as w:
        w.ask()
        w.open(1)
        w.page.click("#more_like")
        w.said("most like the one you picked")
        w.page.wait_for_function("document.querySelector('#q textarea').value === ''")
        w.page.wait_for_selector("#liked img")
        w.closed()
        assert w.visible("#liked img") and w.fits()
        assert not any("probability" in t for t in w.tiles())  # calibrated for sentences alone
        w.page.wait_for_function("location.search.includes('like=')")
        w.page.go_back()
        w.page.wait_for_function(
            "s => (document.querySelector('#q textarea') || {}).value === s", arg=SENTENCE
        )
        w.said("best first")
        assert not w.page.is_visible("#liked")


def test_the_keyboard_alone(browser, address):
    with Walk(browser, address) as w:
        keys = w.page.keyboard
        focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
        assert w.page.evaluate("document.activeElement.tagName") == "TEXTAREA"  # ready to type
        keys.type(SENTENCE)
        keys.press("Enter")
        w.said("of 45 people")
        for _ in range(60):
            keys.press("Tab")
            if w.page.evaluate(focused) == "Thumbnail 1 of 24":
                break
        assert w.page.evaluate(focused) == "Thumbnail 1 of 24"
        keys.press("Enter")
        w.page.wait_for_function("document.activeElement.id === 'close'")
        first = w.page.inner_text("#closer .facts")
        keys.press("ArrowRight")  # the next person
        w.page.wait_for_function(
            "facts => document.querySelector('#closer .facts').innerText !== facts", arg=first
        )
        keys.press("ArrowLeft")
        w.page.wait_for_function(
            "facts => document.querySelector('#closer .facts').innerText === facts", arg=first
        )
        keys.press("Escape")
        w.closed()
        w.page.wait_for_function(f"({focused}) === 'Thumbnail 1 of 24'")
        keys.press("Enter")  # the same person opens again
        w.page.wait_for_selector("#person img")
        w.page.wait_for_function("document.activeElement.id === 'close'")
        for _ in range(12):
            keys.press("Tab")
            if w.page.evaluate(focused) == "pick":
                break
        keys.press("Enter")
        w.page.wait_for_selector("#people .picked")


def test_counts_respect_the_filter(browser, address):
    with Walk(browser, address) as w:
        w.page.click("#list_camera input")
        w.page.get_by_role("option", name="c3").click()
        w.page.keyboard.press("Escape")
        w.ask()
        w.said("15 of 45 people pass the filter; 15 shown")
        assert len(w.tiles()) == 15 and all("camera c3" in t for t in w.tiles())
        w.page.click("#more button")
        w.page.fill("#where textarea, #where input", "camera = 'c2'")
        w.page.press("#where textarea, #where input", "Enter")
        w.page.wait_for_selector("#note .wrong")
        assert "invalid syntax" in w.note() and "Traceback" not in w.page.content()


def test_examples_come_from_the_gallery_and_search(browser, address, gallery):
    with Walk(browser, address) as w:
        examples = w.page.locator("#examples button.gallery-item")
        words = examples.all_inner_texts()
        assert len(words) == 4 and words == fitting_sentences(gallery)
        examples.first.click()
        w.said("of 45 people")
        assert w.page.input_value("#q textarea") == words[0]
        assert float(w.tiles()[0].split()[1]) > 0.9  # somebody fits it


def test_the_improbable_can_be_hidden(browser, address):
    with Walk(browser, address) as w:
        assert "fitted on coloured figures" in w.page.inner_text("#probable")
        w.ask()
        w.page.fill("#probable input[type=number]", "90")
        w.page.press("#probable input[type=number]", "Tab")
        w.ask()
        w.said("probability 0.90 or more")
        chances = [float(re.search(r"probability ([\d.]+)", t)[1]) for t in w.tiles()]
        assert 0 < len(chances) < 24 and min(chances) >= 0.9
        w.page.wait_for_function("location.search.includes('probable=90')")
        w.page.fill("#without textarea, #without input", "green trousers")
        w.ask()
        w.said("nobody was hidden")
    with Walk(browser, address, link="?q=brown&probable=95&where=day+==+1") as w:
        w.said("Nobody here has a probability of 0.95 or more")
        assert "probably nobody here is meant" in w.note()
        assert w.page.locator("#people button img").count() == 0 and not w.page.is_visible("#take")


def test_links_ask_again_and_add_nothing_to_the_page(browser, address):
    with Walk(browser, address) as w:
        w.ask()
        link = w.page.get_attribute("#note a", "href")
    with Walk(browser, address, link=link) as w:
        w.said("24 of 45 people")
        assert w.page.input_value("#q textarea") == SENTENCE
        assert w.tiles()[0].startswith("score 1.000 · probability 1.00 · camera c")
    hostile = dict(
        q="<img src=x onerror=\"document.title='broken'\">",
        where="<script>document.title='broken'</script>",
    )
    with Walk(browser, address, link="?" + urllib.parse.urlencode(hostile)) as w:
        w.page.wait_for_selector("#note .wrong")
        assert w.page.title() != "broken"


@pytest.fixture(scope="module")
def contrast():
    "The script of the walk through the site that lists words of too little contrast."
    path = Path(__file__).parents[1] / "scripts" / "walk_site.py"
    spec = importlib.util.spec_from_file_location("walk_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONTRAST


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read_in_both_themes(browser, address, contrast, dark, tmp_path):
    with Walk(browser, address, dark=dark, link="?q=brown&where=day+==+1") as w:
        w.said("probably nobody here is meant")
        assert not w.page.evaluate(contrast)
        for size in (PHONE, DESK):
            w.resize(size)
            w.open()
            w.page.screenshot(path=tmp_path / f"{size[0]}.png")
            assert not w.page.evaluate(contrast)
            w.page.keyboard.press("Escape")
            w.closed()
        w.page.click("#more button")
        w.page.fill("#where textarea, #where input", "camera = 'c2'")
        w.page.press("#where textarea, #where input", "Enter")
        w.page.wait_for_selector("#note .wrong")
        assert not w.page.evaluate(contrast)
