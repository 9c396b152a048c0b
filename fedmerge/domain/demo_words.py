"""Word lists of the synthetic demo domains (:mod:`fedmerge.domain.demo`), all invented or generic.

Editing any of them changes the frozen data: raise DEMO_VERSION then.
"""
# ruff: noqa: E501  (a literal table reads best with one row a line)
# fmt: off

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """A product family: its place in the category tree, its product nouns, and the leaves of the families people buy next."""

    leaf: str
    nouns: tuple[str, ...]
    complements: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of the titles of one domain."""

    department: str
    families: tuple[Family, ...]
    qualifiers: tuple[str, ...]  # material, flavour, theme: decoration without any effect on taste
    variants: tuple[str, ...]  # size, colour, format: decoration without any effect on taste
    style_words: tuple[str, ...]  # this domain's own word for each of STYLES, in that order


@dataclass(frozen=True, slots=True)
class Style:
    """A taste that exists in every domain, and the words that show it in any of them."""

    name: str
    words: tuple[str, ...]


# People whose main style is STYLES[k] have STYLES[k + 1] (cyclically) as their second one, in every domain.
STYLES: tuple[Style, ...] = (
    Style("eco", ("Organic", "Eco-Friendly", "Recycled", "Sustainable")),
    Style("minimalist", ("Minimalist", "Simple", "Scandinavian", "Uncluttered")),
    Style("value", ("Value", "Everyday", "Budget", "Economy")),
    Style("kids", ("Kids'", "Junior", "Children's", "Family")),
    Style("gift", ("Gift-Boxed", "Holiday", "Birthday", "Keepsake")),
    Style("luxury", ("Luxury", "Premium", "Deluxe", "Signature")),
    Style("vintage", ("Vintage", "Retro", "Classic", "Heritage")),
    Style("outdoor", ("Outdoor", "Travel", "All-Weather", "Portable")),
)

# Levels of experience, in every domain: no word, starter, advanced.
STAGE_WORDS: tuple[tuple[str, ...], ...] = ((), ("Starter", "Beginner", "First"), ("Advanced", "Professional", "Expert"))

BRAND_STARTS = (
    "Aldre", "Brindle", "Corva", "Dunmer", "Elowe", "Farro", "Galver", "Hesper", "Imber", "Jorin", "Kestre", "Lorvan",
    "Marrow", "Nettle", "Orrin", "Pellan", "Quorra", "Rushmer", "Sorrel", "Tamsin", "Umbra", "Velder", "Wexen", "Yarrow",
)
BRAND_ENDS = (
    "bourne", "combe", "dale", "fell", "garth", "holt", "lund", "mere", "ness", "quist", "rigg", "shaw", "thwaite", "vik", "wick", "zell",
)
BRAND_FORMS = ("{}", "{}", "{}", "{} & Co.", "{} Supply", "{} Works", "House of {}", "{} Brothers")

VOCABULARIES: dict[str, Vocabulary] = {
    "beauty": Vocabulary(
        department="Beauty & Personal Care",
        families=(
            Family("Skin Care > Cleansers", ("Foaming Face Wash", "Cleansing Balm", "Micellar Water", "Gel Cleanser"), ("Toners", "Moisturizers")),
            Family("Skin Care > Toners", ("Facial Toner", "Hydrating Face Mist", "Exfoliating Toner Pads", "Astringent"), ("Moisturizers", "Foundation")),
            Family("Skin Care > Moisturizers", ("Day Cream", "Night Cream", "Face Lotion", "Hydrating Gel"), ("Foundation", "Cleansers")),
            Family("Makeup > Foundation", ("Liquid Foundation", "Pressed Powder", "Concealer Stick", "Tinted Primer"), ("Brushes", "Lip Color")),
            Family("Makeup > Lip Color", ("Lipstick", "Lip Gloss", "Lip Liner", "Tinted Lip Balm"), ("Nail Care", "Foundation")),
            Family("Tools > Brushes", ("Blending Sponge", "Powder Brush", "Eyeshadow Brush Set", "Makeup Organizer"), ("Cleansers", "Lip Color")),
            Family("Nails > Nail Care", ("Nail Polish", "Cuticle Oil", "Manicure Kit", "Top Coat"), ("Hair Styling", "Lip Color")),
            Family("Hair > Shampoo", ("Volume Shampoo", "Scalp Conditioner", "Hair Mask", "Detangling Rinse"), ("Hair Styling", "Brushes")),
            Family("Hair > Hair Styling", ("Curling Iron", "Styling Mousse", "Hair Dryer", "Heat Protect Spray"), ("Shampoo", "Nail Care")),
        ),
        qualifiers=("Rose", "Lavender", "Aloe", "Coconut", "Green Tea", "Vanilla", "Citrus", "Honey", "Charcoal", "Almond", "Cucumber", "Jasmine"),
        variants=("1.7 oz", "3.4 oz", "8 oz", "12 oz", "Ivory", "Coral", "Deep Plum", "Light", "Medium", "Pack of 2", "Pack of 3", "Shade 04"),
        style_words=("Cruelty-Free", "Fragrance-Free", "Drugstore", "Tear-Free", "Valentine", "Spa", "Old Hollywood", "Sport"),
    ),
    "books": Vocabulary(
        department="Books",
        families=(
            Family("Fiction > Mystery", ("Detective Novel", "Murder Mystery", "Whodunit Collection", "Crime Thriller"), ("True Stories", "Science Fiction")),
            Family("Fiction > Science Fiction", ("Space Opera", "Time Travel Saga", "Robot Stories", "Alien Chronicle"), ("Popular Science", "Fantasy")),
            Family("Fiction > Fantasy", ("Dragon Saga", "Wizard Tale", "Epic Quest", "Fairy Legends"), ("Games & Puzzles", "Mystery")),
            Family("Fiction > Romance", ("Love Story", "Wedding Novel", "Regency Romance", "Summer Fling"), ("Cookbooks", "Self-Help")),
            Family("Nonfiction > True Stories", ("Biography", "Memoir", "Court Case History", "Letters"), ("Travel Guides", "Mystery")),
            Family("Nonfiction > Popular Science", ("Physics Explained", "Astronomy Guide", "Brain Book", "Math Essays"), ("Games & Puzzles", "Science Fiction")),
            Family("Nonfiction > Travel Guides", ("City Guide", "Road Atlas", "Hiking Guide", "Phrasebook"), ("Cookbooks", "True Stories")),
            Family("Home > Cookbooks", ("Cookbook", "Baking Recipes", "Soup Recipes", "Grill Guide"), ("Self-Help", "Romance")),
            Family("Home > Self-Help", ("Habit Workbook", "Mindfulness Journal", "Career Handbook", "Sleep Guide"), ("Romance", "Travel Guides")),
            Family("Home > Games & Puzzles", ("Crossword Collection", "Logic Puzzles", "Sudoku Book", "Trivia Quiz"), ("Fantasy", "Popular Science")),
        ),
        qualifiers=("Harbor", "Midnight", "Winter", "Garden", "Island", "Mountain", "Silver", "Desert", "Lighthouse", "River", "Autumn", "Northern"),
        variants=("Hardcover", "Paperback", "Large Print", "Second Edition", "Revised", "Volume 1", "Volume 2", "Spiral-Bound", "Audio CD", "Pocket Size", "Box Set", "Annotated"),
        style_words=("Nature", "Concise", "Secondhand", "Read-Aloud", "Coffee Table", "Leather-Bound", "Antiquarian", "Field"),
    ),
    "camping": Vocabulary(
        department="Sports & Outdoors",
        families=(
            Family("Shelter > Tents", ("Dome Tent", "Cabin Tent", "Backpacking Tent", "Tarp Shelter"), ("Sleeping Bags", "Lanterns")),
            Family("Shelter > Sleeping Bags", ("Mummy Sleeping Bag", "Down Quilt", "Sleeping Bag Liner", "Double Sleeping Bag"), ("Mattresses", "Camp Stoves")),
            Family("Shelter > Mattresses", ("Air Mattress", "Foam Roll", "Inflatable Pillow", "Camping Cot"), ("Lanterns", "Camp Furniture")),
            Family("Camp Kitchen > Camp Stoves", ("Gas Burner", "Wood Stove", "Alcohol Stove", "Folding Grill"), ("Cookware", "Hydration")),
            Family("Camp Kitchen > Cookware", ("Mess Kit", "Nesting Pots", "Spork Set", "Enamel Mug"), ("Hydration", "Camp Furniture")),
            Family("Hiking > Hydration", ("Water Filter", "Insulated Bottle", "Hydration Bladder", "Purification Tablets"), ("Backpacks", "Navigation")),
            Family("Hiking > Backpacks", ("Trekking Backpack", "Dry Sack", "Daypack", "Rain Cover"), ("Navigation", "Tents")),
            Family("Hiking > Navigation", ("Compass", "GPS Unit", "Map Case", "Altimeter Watch"), ("Lanterns", "Backpacks")),
            Family("Camp Life > Lanterns", ("LED Lantern", "Headlamp", "String Lights", "Torch"), ("Camp Furniture", "Camp Stoves")),
            Family("Camp Life > Camp Furniture", ("Folding Chair", "Roll-Up Table", "Hammock", "Picnic Blanket"), ("Cookware", "Tents")),
        ),
        qualifiers=("Ripstop", "Titanium", "Aluminum", "Nylon", "Canvas", "Polyester", "Steel", "Mesh", "Fleece", "Insulated", "Waterproof", "Lightweight"),
        variants=("Forest Green", "Orange", "Slate Gray", "2-Person", "4-Person", "Small", "Large", "Regular", "Long", "Navy", "Sand", "Pack of 2"),
        style_words=("Leave-No-Trace", "Ultralight", "Rental-Grade", "Scout", "Adventure Gift", "Glamping", "Army Surplus", "Expedition"),
    ),
    "coffee": Vocabulary(
        department="Grocery & Gourmet",
        families=(
            Family("Coffee > Whole Bean", ("Whole Bean Coffee", "Espresso Beans", "Single-Origin Beans", "Decaf Beans"), ("Grinders", "Syrups")),
            Family("Coffee > Pods", ("Coffee Pods", "Espresso Capsules", "Cold Brew Packs", "Instant Sticks"), ("Milk Frothing", "Cookies")),
            Family("Tea > Loose Tea", ("Black Tea", "Oolong Leaves", "Herbal Infusion", "Matcha Powder"), ("Teaware", "Honey")),
            Family("Equipment > Grinders", ("Burr Grinder", "Hand Mill", "Dosing Scale", "Bean Canister"), ("Brewers", "Cleaning")),
            Family("Equipment > Brewers", ("Pour-Over Dripper", "French Press", "Moka Pot", "Siphon Carafe"), ("Filters", "Whole Bean")),
            Family("Equipment > Filters", ("Paper Filters", "Mesh Cone", "Cloth Sock Strainer", "Basket Liners"), ("Whole Bean", "Cleaning")),
            Family("Equipment > Milk Frothing", ("Steam Pitcher", "Electric Whisk", "Milk Thermometer", "Foam Maker"), ("Syrups", "Pods")),
            Family("Equipment > Teaware", ("Teapot", "Infuser Basket", "Bamboo Chasen", "Porcelain Gaiwan"), ("Cookies", "Loose Tea")),
            Family("Pantry > Syrups", ("Barista Syrup", "Chocolate Sauce", "Flavor Drops", "Caramel Drizzle"), ("Cookies", "Milk Frothing")),
            Family("Pantry > Honey", ("Raw Honey", "Rock Sugar", "Agave Nectar", "Maple Cubes"), ("Loose Tea", "Cookies")),
            Family("Pantry > Cookies", ("Shortbread", "Biscotti", "Wafer Rolls", "Ginger Snaps"), ("Pods", "Loose Tea")),
            Family("Care > Cleaning", ("Descaling Solution", "Backflush Tablets", "Portafilter Brush", "Group Head Wipes"), ("Brewers", "Filters")),
        ),
        qualifiers=("Hazelnut", "Vanilla", "Cinnamon", "Mocha", "Maple", "Orange Peel", "Bergamot", "Mint", "Smoky", "Cocoa", "Cardamom", "Berry"),
        variants=("8 oz", "12 oz", "1 lb", "2 lb", "Pack of 3", "Pack of 6", "24 Count", "50 Count", "100 Count", "Tin", "Resealable Bag", "Jar"),
        style_words=("Shade-Grown", "Unblended", "Office Bulk", "Caffeine-Free", "Sampler Gift", "Reserve", "Old World", "Campfire"),
    ),
    "garden": Vocabulary(
        department="Patio, Lawn & Garden",
        families=(
            Family("Plants > Seeds", ("Tomato Seeds", "Wildflower Mix", "Herb Seeds", "Sunflower Seeds"), ("Soil", "Pots")),
            Family("Plants > Bulbs", ("Tulip Bulbs", "Dahlia Tubers", "Crocus Corms", "Iris Rhizomes"), ("Hand Tools", "Fertilizer")),
            Family("Growing > Soil", ("Potting Mix", "Compost", "Coir Bricks", "Raised Bed Blend"), ("Fertilizer", "Pots")),
            Family("Growing > Fertilizer", ("Plant Food", "Bone Meal", "Kelp Emulsion", "Slow-Release Pellets"), ("Watering", "Pest Control")),
            Family("Growing > Pots", ("Terracotta Planter", "Window Box", "Hanging Basket", "Grow Bag"), ("Watering", "Decor")),
            Family("Tools > Hand Tools", ("Trowel", "Pruning Shears", "Weeding Fork", "Bulb Dibber"), ("Gloves", "Bulbs")),
            Family("Tools > Gloves", ("Leather Gauntlets", "Kneeling Pad", "Sun Hat", "Waist Apron"), ("Pest Control", "Hand Tools")),
            Family("Tools > Watering", ("Watering Can", "Soaker Hose", "Drip Kit", "Spray Nozzle"), ("Seeds", "Gloves")),
            Family("Wildlife > Pest Control", ("Slug Barrier", "Neem Spray", "Bird Netting", "Sticky Traps"), ("Bird Feeding", "Fertilizer")),
            Family("Wildlife > Bird Feeding", ("Tube Feeder", "Suet Cakes", "Nesting Box", "Hummingbird Nectar"), ("Decor", "Seeds")),
            Family("Living > Decor", ("Solar Stakes", "Wind Chime", "Stepping Stone", "Garden Gnome"), ("Bulbs", "Bird Feeding")),
        ),
        qualifiers=("Cedar", "Copper", "Heirloom", "Ceramic", "Bamboo", "Galvanized", "Mossy", "Perennial", "Stone", "Wicker", "Sunny", "Cottage"),
        variants=("Green", "Rust", "6-Inch", "12-Inch", "Set of 2", "Set of 4", "5 lb", "20 lb", "1 Gallon", "Small", "Large", "Packet of 100"),
        style_words=("Pollinator-Safe", "Zen", "Contractor", "Schoolyard", "Housewarming", "Estate", "Victorian", "Hardy"),
    ),
    "kitchen": Vocabulary(
        department="Home & Kitchen",
        families=(
            Family("Cookware > Skillets", ("Frying Pan", "Cast Iron Skillet", "Wok", "Griddle"), ("Utensils", "Spices")),
            Family("Cookware > Pots", ("Stockpot", "Dutch Oven", "Saucepan", "Steamer Pot"), ("Food Storage", "Utensils")),
            Family("Prep > Knives", ("Chef Knife", "Paring Knife", "Bread Knife", "Cleaver"), ("Cutting Boards", "Skillets")),
            Family("Prep > Cutting Boards", ("Chopping Board", "Salad Spinner", "Mandoline", "Colander"), ("Skillets", "Food Storage")),
            Family("Prep > Utensils", ("Spatula", "Ladle", "Silicone Tongs", "Wooden Spoon"), ("Spices", "Knives")),
            Family("Baking > Bakeware", ("Loaf Pan", "Muffin Tin", "Cookie Sheet", "Springform Pan"), ("Mixers", "Cake Decorating")),
            Family("Baking > Mixers", ("Stand Mixer", "Hand Blender", "Whisk", "Dough Hook"), ("Cake Decorating", "Bakeware")),
            Family("Baking > Cake Decorating", ("Piping Bags", "Fondant Roller", "Cake Turntable", "Sprinkle Assortment"), ("Tableware", "Bakeware")),
            Family("Dining > Tableware", ("Dinner Plates", "Wine Glasses", "Flatware", "Serving Platter"), ("Linens", "Pots")),
            Family("Dining > Linens", ("Tea Towels", "Oven Mitts", "Tablecloth", "Napkin Rings"), ("Tableware", "Bakeware")),
            Family("Pantry > Food Storage", ("Glass Containers", "Mason Jars", "Bread Bin", "Vacuum Bags"), ("Pots", "Spices")),
            Family("Pantry > Spices", ("Pepper Mill", "Curry Blend", "Sea Salt", "Spice Rack"), ("Knives", "Linens")),
        ),
        qualifiers=("Stainless Steel", "Ceramic", "Nonstick", "Bamboo", "Copper", "Enamel", "Glass", "Walnut", "Silicone", "Marble", "Hammered", "Speckled"),
        variants=("Red", "White", "Black", "8-Inch", "10-Inch", "12-Inch", "2-Quart", "5-Quart", "Set of 3", "Set of 6", "Small", "Sage"),
        style_words=("Compostable", "Nordic", "Dorm", "Little Chef", "Wedding Registry", "Chateau", "Farmhouse", "Picnic"),
    ),
    "pets": Vocabulary(
        department="Pet Supplies",
        families=(
            Family("Dogs > Dog Food", ("Dry Kibble", "Canned Stew", "Puppy Chow", "Raw Topper"), ("Dog Treats", "Bowls")),
            Family("Dogs > Dog Treats", ("Chew Sticks", "Training Bites", "Dental Bones", "Jerky Strips"), ("Leashes", "Dog Toys")),
            Family("Dogs > Leashes", ("Retractable Leash", "Harness", "Collar", "Poop Bag Holder"), ("Dog Toys", "Grooming")),
            Family("Dogs > Dog Toys", ("Squeaky Ball", "Tug Rope", "Flying Disc", "Puzzle Feeder"), ("Beds", "Dog Treats")),
            Family("Cats > Cat Food", ("Salmon Pate", "Kitten Formula", "Tuna Flakes", "Hairball Biscuits"), ("Litter", "Bowls")),
            Family("Cats > Litter", ("Clumping Litter", "Litter Box", "Odor Granules", "Scoop"), ("Cat Trees", "Grooming")),
            Family("Cats > Cat Trees", ("Scratching Post", "Window Perch", "Sisal Tower", "Feather Wand"), ("Beds", "Cat Food")),
            Family("Home > Beds", ("Orthopedic Bed", "Donut Cushion", "Crate Mat", "Fleece Blanket"), ("Grooming", "Dog Food")),
            Family("Home > Bowls", ("Slow Bowl", "Water Fountain", "Elevated Feeder", "Food Bin"), ("Dog Food", "Aquariums")),
            Family("Care > Grooming", ("Deshedding Brush", "Oatmeal Shampoo", "Claw Clippers", "Flea Comb"), ("Dog Treats", "Litter")),
            Family("Fish > Aquariums", ("Glass Tank", "Sponge Filter", "Gravel", "Betta Flakes"), ("Bowls", "Beds")),
        ),
        qualifiers=("Chicken", "Salmon", "Plush", "Rubber", "Cotton", "Peanut Butter", "Reflective", "Quilted", "Nylon", "Beef", "Suede", "Pumpkin"),
        variants=("Small", "Medium", "Large", "X-Large", "Blue", "Red", "Gray", "5 lb", "15 lb", "Pack of 12", "Pack of 24", "Striped"),
        style_words=("Biodegradable", "Grain-Free", "Shelter", "Playtime", "Gotcha Day", "Pampered", "Tweed", "Trail"),
    ),
    "toys": Vocabulary(
        department="Toys & Games",
        families=(
            Family("Building > Blocks", ("Building Blocks", "Castle Brick Set", "Marble Run", "Gear Tower"), ("Vehicles", "Science Kits")),
            Family("Building > Vehicles", ("Race Car", "Train Track", "Fire Truck", "Toy Crane"), ("Remote Control", "Play Figures")),
            Family("Building > Remote Control", ("RC Drone", "RC Buggy", "Rechargeable Batteries", "RC Boat"), ("Science Kits", "Vehicles")),
            Family("Pretend > Dolls", ("Fashion Doll", "Baby Doll", "Dollhouse", "Doll Stroller"), ("Dress-Up", "Plush")),
            Family("Pretend > Dress-Up", ("Princess Costume", "Pirate Hat", "Face Paint", "Hero Cape"), ("Arts & Crafts", "Play Figures")),
            Family("Pretend > Play Figures", ("Dinosaur Figures", "Farm Animals", "Knight Action Figure", "Space Ranger"), ("Blocks", "Board Games")),
            Family("Pretend > Plush", ("Teddy Bear", "Plush Unicorn", "Hand Puppet", "Comfort Blanket"), ("Puzzles", "Dolls")),
            Family("Learning > Science Kits", ("Chemistry Lab", "Microscope", "Volcano Experiment", "Solar Robot"), ("Board Games", "Puzzles")),
            Family("Learning > Arts & Crafts", ("Finger Paints", "Bead Kit", "Modeling Clay", "Sticker Album"), ("Plush", "Puzzles")),
            Family("Games > Puzzles", ("Jigsaw Puzzle", "Brain Teaser Cube", "Floor Puzzle", "Tangram"), ("Board Games", "Arts & Crafts")),
            Family("Games > Board Games", ("Strategy Board Game", "Card Game", "Dice Game", "Party Quiz"), ("Puzzles", "Blocks")),
        ),
        qualifiers=("Wooden", "Magnetic", "Glow-in-the-Dark", "Rainbow", "Jungle", "Ocean", "Galaxy", "Talking", "Soft", "Pirate", "Safari", "Candy"),
        variants=("Ages 3+", "Ages 6+", "Ages 8+", "50 Pieces", "100 Pieces", "500 Pieces", "Pink", "Yellow", "Set of 2", "Set of 10", "Mini", "Jumbo"),
        style_words=("Plastic-Free", "Montessori", "Party Favor", "Toddler", "Stocking Stuffer", "Collector", "Nostalgic", "Backyard"),
    ),
    "music": Vocabulary(
        department="Musical Instruments",
        families=(
            Family("Strings > Guitars", ("Acoustic Guitar", "Electric Guitar", "Ukulele", "Bass"), ("Guitar Strings", "Amplifiers")),
            Family("Strings > Guitar Strings", ("String Set", "Picks", "Capo", "Fretboard Oil"), ("Tuners", "Straps & Cases")),
            Family("Strings > Straps & Cases", ("Shoulder Strap", "Hard Case", "Gig Bag", "Wall Hanger"), ("Sheet Music", "Guitars")),
            Family("Keys > Keyboards", ("Digital Piano", "Synthesizer", "Melodica", "MIDI Controller"), ("Stands & Benches", "Headphones")),
            Family("Keys > Stands & Benches", ("Folding Stand", "Padded Bench", "Sustain Pedal", "Dust Cover"), ("Sheet Music", "Keyboards")),
            Family("Rhythm > Drums", ("Snare Drum", "Cajon", "Practice Pad", "Djembe"), ("Sticks & Cymbals", "Headphones")),
            Family("Rhythm > Sticks & Cymbals", ("Maple Sticks", "Crash Cymbal", "Brushes", "Hi-Hat"), ("Drums", "Microphones")),
            Family("Study > Sheet Music", ("Songbook", "Method Book", "Manuscript Paper", "Chord Chart"), ("Tuners", "Recorders")),
            Family("Study > Tuners", ("Clip-On Tuner", "Metronome", "Tuning Fork", "Pitch Pipe"), ("Guitars", "Sheet Music")),
            Family("Wind > Recorders", ("Soprano Recorder", "Harmonica", "Ocarina", "Tin Whistle"), ("Stands & Benches", "Tuners")),
            Family("Studio > Microphones", ("Condenser Mic", "Pop Shield", "Boom Arm", "Audio Interface"), ("Headphones", "Amplifiers")),
            Family("Studio > Headphones", ("Monitor Headphones", "Earplugs", "Extension Cable", "Splitter"), ("Amplifiers", "Microphones")),
            Family("Studio > Amplifiers", ("Combo Amp", "Overdrive Effect", "Reverb Box", "Patch Cable"), ("Guitar Strings", "Microphones")),
        ),
        qualifiers=("Mahogany", "Spruce", "Nickel", "Brass", "Rosewood", "Phosphor Bronze", "Maple", "Sunburst", "Carbon", "Velvet", "Chrome", "Ebony"),
        variants=("Black", "Natural", "Cherry Red", "Full Size", "3/4 Size", "Left-Handed", "Set of 2", "Set of 6", "Light Gauge", "10 ft", "20 ft", "In C"),
        style_words=("Reclaimed", "Unplugged", "Student", "Classroom", "Recital Gift", "Concert", "Bluesman", "Busking"),
    ),
    "office": Vocabulary(
        department="Office Products",
        families=(
            Family("Writing > Pens", ("Gel Pen", "Fountain Pen", "Fineliner", "Mechanical Pencil"), ("Notebooks", "Ink & Refills")),
            Family("Writing > Ink & Refills", ("Bottled Ink", "Ink Cartridges", "Pencil Leads", "Blotter"), ("Cards & Envelopes", "Pens")),
            Family("Writing > Highlighters", ("Pastel Highlighter", "Dry-Erase Marker", "Brush Marker", "Crayon Stick"), ("Sticky Notes", "Whiteboards")),
            Family("Paper > Notebooks", ("Dotted Notebook", "Legal Pad", "Weekly Planner", "Sketchbook"), ("Highlighters", "Folders")),
            Family("Paper > Sticky Notes", ("Sticky Notes", "Index Tabs", "Memo Cubes", "Page Flags"), ("Folders", "Notebooks")),
            Family("Paper > Cards & Envelopes", ("Greeting Cards", "Padded Mailers", "Letter Set", "Wax Seals"), ("Labels", "Pens")),
            Family("Filing > Folders", ("Hanging Folders", "Ring Binder", "Accordion File", "Sheet Protectors"), ("Labels", "Desk Organizers")),
            Family("Filing > Labels", ("Label Maker", "Address Labels", "Packing Tape", "Date Stamp"), ("Cards & Envelopes", "Folders")),
            Family("Desk > Desk Organizers", ("Letter Tray", "Drawer Divider", "Monitor Riser", "Cable Box"), ("Desk Lamps", "Folders")),
            Family("Desk > Desk Lamps", ("Task Lamp", "Clamp Light", "Desk Fan", "Footrest"), ("Whiteboards", "Desk Organizers")),
            Family("Meeting > Whiteboards", ("Whiteboard", "Cork Board", "Easel", "Wall Calendar"), ("Highlighters", "Desk Lamps")),
        ),
        qualifiers=("Kraft", "Linen", "Acrylic", "Oak", "Brushed Metal", "Leather", "Marbled", "Cork", "Frosted", "Pinstripe", "Floral", "Walnut"),
        variants=("Black", "Blue", "Assorted Colors", "A4", "A5", "Letter Size", "0.5 mm", "Pack of 5", "Pack of 12", "Box of 50", "Small", "Tall"),
        style_words=("Tree-Free", "Clutter-Free", "Bulk", "Back-to-School", "Retirement Gift", "Executive", "Typewriter-Era", "On-the-Go"),
    ),
}
